"""The learned component on a tiny model: refusals come, the other answers stay."""

import pytest
import torch

from benchmarks.paper_table import repair
from safegene_trl.models.inputs import batches, tokenize
from safegene_trl.models.losses import cross_entropy, divergence, response_logits

from ..conftest import BENIGN, HARMFUL, TASK, attached, make_model


@pytest.fixture
def samples(tokenizer):
    def answered(prompts, answer):
        return [
            tokenize(tokenizer, [{"role": "user", "content": prompt}], answer) for prompt in prompts
        ]

    return (
        answered(HARMFUL, "sorry i cannot help with that"),
        answered([*BENIGN, *(f"{prompt} at home" for prompt in BENIGN)], "take a pan and stir"),
        answered(TASK, "it goes into the blue box"),
    )


def test_refusals_are_learned_and_other_answers_held(samples, monkeypatch):
    monkeypatch.setattr(repair, "STEPS", 40)
    monkeypatch.setattr(repair, "RATE", 1e-2)

    def loss(model, group, held=None):
        (batch,) = batches(group, len(group), 0, torch.device("cpu"))
        value = cross_entropy(model, batch) if held is None else divergence(model, batch, held)
        return float(value.sum() / batch.target_mask.sum())

    refusals, benign, instructions = samples
    model = make_model()
    with torch.no_grad():
        before = loss(model, refusals)
        held = [
            response_logits(model, *batches(group, len(group), 0, torch.device("cpu")))[
                0
            ].log_softmax(dim=-1)
            for group in (benign, instructions)
        ]
    learned = repair._train(make_model(), 0, *samples)
    with torch.no_grad(), attached(model, learned):
        after = loss(model, refusals)
        moved = [
            loss(model, group, of) for group, of in zip((benign, instructions), held, strict=True)
        ]
    assert (
        all(delta.a.shape[0] == repair.RANK for delta in learned.values()) and len(learned) == 3 * 7
    )
    assert after < before - 1.5 and max(moved) < 0.2 * (before - after)
