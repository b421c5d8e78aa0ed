"""Batched answers equal single ones, whatever the padding and whatever a checkpoint's generation
config says.
"""

import pytest
import torch
from transformers import GenerationConfig

from safegene_trl.models.generation import generate_answers, plain_decoding, prompt_tokens

from ..architectures import make_architecture
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


def test_a_mixture_that_was_trained_with_its_router_s_logits_answers_without(tokenizer):
    model = make_architecture("mixtral")
    answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=2)
    model.config.output_router_logits = True  # as TRL leaves it
    asked = []
    model.register_forward_pre_hook(lambda *_: asked.append(model.config.output_router_logits))
    again = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=2)
    assert again == answers and asked and not any(asked)
    assert model.config.output_router_logits is True


@pytest.fixture
def decoded():
    """Shapes of what goes through a model's layers, by `decoded(model)`."""

    def watch(model):
        shapes = []
        model.model.register_forward_pre_hook(
            lambda module, inputs, named: shapes.append(tuple(named["input_ids"].shape)),
            with_kwargs=True,
        )
        return shapes

    return watch


@pytest.mark.parametrize("cache", [True, False])
def test_every_token_goes_through_the_model_once(cache, tokenizer, decoded):
    """Whatever the config says of the cache, which trainers turn off."""
    model = make_model()
    model.config.use_cache = model.generation_config.use_cache = cache
    shapes = decoded(model)
    generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2)
    tokens = sorted(map(len, prompt_tokens(tokenizer, PROMPTS)))
    # batches of prompts of like length; the last token of an answer is not read any more
    expected = [(2, tokens[1]), *[(2, 1)] * 5, (2, tokens[3]), *[(2, 1)] * 5]
    assert shapes == expected


def test_decoding_ends_where_the_last_answer_of_a_batch_does(tokenizer, decoded):
    model = make_model()
    ends = {0: 2, 1: 4}  # how many tokens each prompt's answer has, the end included
    steps, shapes = [], decoded(model)

    def ending(module, inputs, output):
        steps.append(True)
        for row, length in ends.items():
            output.logits[row, -1] = 0
            output.logits[row, -1, 1 if len(steps) >= length else 40] = 1
        return output

    model.register_forward_hook(ending)
    answers = generate_answers(model, tokenizer, PROMPTS[:1] * 2, max_new_tokens=50, batch_size=2)
    assert len(shapes) == 4 and sum(width for _, width in shapes[1:]) == 3
    assert answers == [tokenizer.decode([40] * (length - 1)).strip() for length in ends.values()]


def test_batches_are_of_prompts_with_like_numbers_of_tokens(tokenizer, decoded):
    """A prompt of few letters may have many tokens."""
    texts = ["how do i cook dish number 1", "§¶÷¬" * 5, "how do i cook dish number 2", "§¶÷¬" * 4]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    lengths = sorted(map(len, prompt_tokens(tokenizer, prompts)))
    model = make_model()
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=1, batch_size=4)
    shapes = decoded(model)
    assert generate_answers(model, tokenizer, prompts, 1, 2) == together
    assert shapes == [(2, lengths[1]), (2, lengths[3])] and lengths[1] < lengths[2]
    assert len(texts[1]) < len(texts[0])


def test_tokens_of_all_prompts_are_those_of_each(tokenizer):
    alone = [prompt_tokens(tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert prompt_tokens(tokenizer, PROMPTS) == alone and prompt_tokens(tokenizer, []) == []


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
