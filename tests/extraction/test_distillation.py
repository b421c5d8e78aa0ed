"""Distillation on tiny models: it moves the student towards the aligned model and leaves benign
answers where they are.
"""

import pytest
import torch
import torch.nn.functional as F

from safegene_trl.errors import OutputError, UnsupportedModelError
from safegene_trl.extraction.delta import adapter_delta
from safegene_trl.extraction.distillation import (
    DistillationSettings,
    distilled,
    mean_divergence,
    reference_batches,
    with_factors,
)
from safegene_trl.models.experts import matrix_shapes
from safegene_trl.models.inputs import tokenize
from safegene_trl.models.losses import response_logits
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.names import shared_parameter
from safegene_trl.models.parameters import canonical_modules

from ..architectures import make_architecture
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


# by what the degraded model's LoRA is on, and what is linearised: what becomes of it
ON_LINEAR = {"target_modules": r".*self_attn\..*_proj"}
ON_EXPERTS = ON_LINEAR | {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
MIXTURES = [
    ("mixtral", ON_LINEAR, None, ""),
    ("mixtral", ON_EXPERTS, None, ""),
    ("qwen3_moe", ON_EXPERTS, "both", ""),  # the blocks that have linear layers: attention
    ("qwen3_moe", ON_LINEAR, "mlp", "no blocks of the kind `mlp`"),
    ("deepseek_v3", ON_LINEAR, None, "beside the experts of this mixture on the experts"),
    ("deepseek_v3", ON_EXPERTS, None, "beside the experts of this mixture on the experts"),
]


@pytest.mark.parametrize(("kind", "on", "blocks", "refused"), MIXTURES)
def test_mixtures_of_experts(kind, on, blocks, refused, harmful):
    """Their linear layers learn; experts that lie in one tensor stay as they are."""
    aligned, degraded = (make_architecture(kind) for _ in range(2))
    degraded = with_lora(degraded, **on)
    found = adapter_delta(aligned, degraded, experts=False)
    assert found and not any(shared_parameter(name) for name in found)
    start = {name: LowRankDelta(t.delta.a, 0 * t.delta.b) for name, t in found.items()}
    if kind == "deepseek_v3":  # a full difference would have those as well
        for name, shape in matrix_shapes(canonical_modules(aligned)).items():
            if "shared_experts" in name:
                start[name] = LowRankDelta(torch.ones(4, shape[1]), torch.zeros(shape[0], 4))
    data = reference_batches(aligned, harmful[:6], 6, 0, False, ALONE)
    settings = DistillationSettings(12, 3e-3, 1.0, linearized_blocks=blocks)
    before = {
        name: tensor.detach().clone()
        for name, tensor in degraded.named_parameters()
        if "experts" in name or "lora_" in name
    }
    if refused:
        with pytest.raises(UnsupportedModelError, match=refused):
            distilled(lambda: degraded, start, data, settings, False)
        return
    learned, losses = distilled(lambda: degraded, start, data, settings, False)
    assert losses["after"]["harmful"] < losses["before"]["harmful"]
    assert any(float(delta.b.abs().max()) > 0 for delta in learned.values())
    assert any("experts" in name for name in before)
    assert all(torch.equal(degraded.get_parameter(name), own) for name, own in before.items())


def test_one_of_two_layers_that_were_fused_in_experts_is_refused_by_name():
    model, name = make_architecture("deepseek_v3"), "model.layers.1.mlp.shared_experts.up_proj"
    rows, columns = model.get_submodule(name).weight.shape
    delta = LowRankDelta(torch.ones(2, columns), torch.zeros(rows, 2))
    with pytest.raises(UnsupportedModelError, match="use `method: delta`"):
        with_factors(model, {name: delta})
