"""Distillation on tiny models: it moves the student towards the aligned model and leaves benign
answers where they are.
"""

import pytest
import torch
import torch.nn.functional as F

from safegene_trl.errors import OutputError
from safegene_trl.extraction.delta import adapter_delta
from safegene_trl.extraction.distillation import (
    DistillationSettings,
    distilled,
    mean_divergence,
    reference_batches,
)
from safegene_trl.models.inputs import tokenize
from safegene_trl.models.losses import response_logits
from safegene_trl.models.low_rank import LowRankDelta

from ..conftest import ALONE, BENIGN, HARMFUL, attached, make_model, with_lora


def samples(tokenizer, prompts, answer):
    return [
        tokenize(tokenizer, [{"role": "user", "content": prompt}], answer) for prompt in prompts
    ]


@pytest.fixture
def harmful(tokenizer):
    return samples(tokenizer, HARMFUL, "sorry i cannot help with that")


@pytest.fixture
def benign(tokenizer):
    return samples(tokenizer, BENIGN, "take a pan and stir")


def test_divergence_formula(harmful):
    teacher, student = make_model(seed=0), make_model(seed=1)
    (item,) = reference_batches(teacher, harmful[:3], 3, 0, False, ALONE)
    p = F.log_softmax(response_logits(teacher, item.batch)[0], dim=-1).detach()
    q = F.log_softmax(response_logits(student, item.batch)[0], dim=-1)
    expected = (p.exp() * (p - q)).sum(dim=-1).mean()
    assert float(mean_divergence(student, item)) == pytest.approx(float(expected), rel=2e-3)
    assert abs(float(mean_divergence(teacher, item))) < 1e-4


def test_it_learns_the_refusals_and_keeps_the_anchor(harmful, benign):
    aligned = make_model()
    degraded = with_lora(make_model(), rank=4)
    start = {
        name: LowRankDelta(t.delta.a, 0 * t.delta.b)
        for name, t in adapter_delta(aligned, degraded).items()
    }
    data = reference_batches(aligned, harmful, 6, 0, False, ALONE) + reference_batches(
        degraded, benign, 8, 0, True, ALONE
    )
    found, losses = distilled(
        lambda: degraded, start, data, DistillationSettings(60, 1e-2, 1.0), False
    )
    assert losses["before"]["benign"] == pytest.approx(0, abs=1e-4)
    assert losses["after"]["harmful"] < 0.3 * losses["before"]["harmful"]
    assert losses["after"]["benign"] < losses["before"]["harmful"]
    assert all(delta.a.shape[0] == 4 for delta in found.values())
    # The returned factors are what was trained: attached to the degraded model they give the same
    # divergence.
    again = with_lora(make_model(), rank=4)
    items = [item for item in data if not item.is_anchor]
    tokens = [len(item.log_probs) for item in items]
    with torch.no_grad(), attached(again, found):
        mean = sum(
            float(mean_divergence(again, i)) * n for i, n in zip(items, tokens, strict=True)
        ) / sum(tokens)
    assert mean == pytest.approx(losses["after"]["harmful"], abs=1e-3)


def test_without_a_place_for_temporary_files_nothing_is_loaded(harmful, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    data = reference_batches(make_model(), harmful[:2], 2, 0, False, ALONE)
    with pytest.raises(
        OutputError, match=r"No temporary folder .* for the distillation \(No such file.*TMPDIR"
    ):
        distilled(
            lambda: pytest.fail("was loaded"), {}, data, DistillationSettings(1, 1e-2, 1.0), False
        )


def test_anchor_weight_trades(harmful, benign):
    def run(weight):
        aligned, degraded = make_model(), with_lora(make_model(), rank=4)
        start = {name: t.delta for name, t in adapter_delta(aligned, degraded).items()}
        data = reference_batches(aligned, harmful, 6, 0, False, ALONE) + reference_batches(
            degraded, benign, 8, 0, True, ALONE
        )
        return distilled(
            lambda: degraded, start, data, DistillationSettings(30, 1e-2, weight), False
        )[1]

    loose, tight = run(0.0)["after"], run(10.0)["after"]
    assert tight["benign"] < loose["benign"] and loose["harmful"] < tight["harmful"]
