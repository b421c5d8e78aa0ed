"""Batched answers equal single ones, whatever the padding."""

from safegene_trl.evaluation.generation import generate_answers

from ..conftest import make_model, with_lora


def test_batching_does_not_change_answers(tokenizer):
    model = with_lora(make_model())
    prompts = [[{"role": "user", "content": "word " * count}] for count in (1, 7, 3, 5)]
    side = tokenizer.padding_side
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    alone = [generate_answers(model, tokenizer, [prompt], max_new_tokens=6, batch_size=1)[0] for prompt in prompts]
    assert together == alone and any(together)
    assert tokenizer.padding_side == side
