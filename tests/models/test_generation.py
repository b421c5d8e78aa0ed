"""Batched answers equal single ones, whatever the padding and whatever a checkpoint's generation
config says.
"""

import pytest
import torch
from transformers import GenerationConfig

from safegene_trl.models.generation import generate_answers, plain_decoding

from ..conftest import make_model, make_tokenizer, with_lora


PROMPTS = [[{"role": "user", "content": "word " * count}] for count in (1, 7, 3, 5)]


def test_batching_does_not_change_answers(tokenizer):
    model = with_lora(make_model())
    side = tokenizer.padding_side
    together = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    alone = [
        generate_answers(model, tokenizer, [prompt], max_new_tokens=6, batch_size=1)[0]
        for prompt in PROMPTS
    ]
    assert together == alone and any(together)
    assert tokenizer.padding_side == side


def first_token(model, tokenizer):
    """What plain decoding begins the first answer with."""
    text = tokenizer.apply_chat_template(PROMPTS[0], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return int(model(ids).logits[0, -1].argmax())


def settings(first):
    """Settings of a generation config that change what `generate` returns."""
    yield "repetition_penalty", {"repetition_penalty": 5.0}
    yield "num_beams", {"num_beams": 4, "length_penalty": -5.0}
    yield "several answers", {"num_beams": 3, "num_return_sequences": 3}
    yield "sampling", {"do_sample": True, "temperature": 5.0, "top_k": 0}
    yield "suppress_tokens", {"suppress_tokens": [first]}
    yield "begin_suppress_tokens", {"begin_suppress_tokens": [first]}
    yield "bad_words_ids", {"bad_words_ids": [[first]]}
    yield "sequence_bias", {"sequence_bias": [[[first], -1e4]]}
    yield "no_repeat_ngram_size", {"no_repeat_ngram_size": 1}
    yield "encoder_repetition_penalty", {"encoder_repetition_penalty": 50.0}
    yield "exponential_decay_length_penalty", {"exponential_decay_length_penalty": [1, 1e4]}
    yield "forced_eos_token_id", {"forced_eos_token_id": 7, "max_length": 20}
    yield "guidance_scale", {"guidance_scale": 30.0}
    yield "max_time", {"max_time": 1e-9}
    yield "stop_strings", {"stop_strings": ["a", "e", "o"]}
    yield "watermarking", {"watermarking_config": {"bias": 1e4, "greenlist_ratio": 0.05}}
    yield "token_healing", {"token_healing": True}
    yield "output", {"return_dict_in_generate": True, "output_scores": True}
    yield "assistant", {"prompt_lookup_num_tokens": 3}
    yield "quantised cache", {"cache_implementation": "quantized"}


@pytest.mark.parametrize("name", [name for name, _ in settings(0)])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
def test_the_generation_config_does_not_change_answers(name, lora, tokenizer):
    model = with_lora(make_model()) if lora else make_model()
    base = model.get_base_model() if lora else model
    plain = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    own = GenerationConfig(eos_token_id=1, **dict(settings(first_token(model, tokenizer)))[name])
    base.generation_config = own
    if lora:
        model.generation_config = own  # PEFT hands this one on
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4) == plain
    assert model.generation_config is own and base.generation_config is own


def answer(model, tokenizer):
    return generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=6, batch_size=1)[0]


def test_a_shortest_answer_does_not_count(tokenizer):
    model = make_model()
    end = model.config.eos_token_id = first_token(model, tokenizer)  # the answer is over at once
    model.generation_config.min_new_tokens = 6
    assert answer(model, tokenizer) == tokenizer.decode([end])


@pytest.mark.parametrize("place", ["generation config", "config", "tokenizer"])
def test_every_end_of_an_answer_counts(place):
    model, tokenizer = make_model(), make_tokenizer()
    end = first_token(model, tokenizer)
    assert len(answer(model, tokenizer)) > len(tokenizer.decode([end]))
    if place == "generation config":
        model.generation_config.eos_token_id = [1, end]
    elif place == "config":
        model.config.eos_token_id = [end]
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    # the tokenizer leaves its own end out
    assert answer(model, tokenizer) in (
        tokenizer.decode([end]),
        "",
    )


def test_the_generation_config_comes_back_after_an_error():
    model = make_model()
    own = model.generation_config
    with pytest.raises(ZeroDivisionError), plain_decoding(model):
        assert model.generation_config is not own
        raise ZeroDivisionError
    assert model.generation_config is own
