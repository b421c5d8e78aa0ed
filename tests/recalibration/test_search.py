"""The objective, its gradient, the acceptance, and that the model comes out as it went in."""

import json
import math
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from safegene_trl.data.calibration import CalibrationSet, Split
from safegene_trl.errors import RecalibrationError
from safegene_trl.models import batch_size, losses
from safegene_trl.models.attachment import frozen_for_calibration, recomputing
from safegene_trl.models.inputs import Sample, batches
from safegene_trl.models.losses import divergence, response_logits
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.parameters import base_model
from safegene_trl.recalibration import search as recalibration
from safegene_trl.recalibration.objective import Losses, Objective, Passes, evaluate_objective
from safegene_trl.recalibration.search import recalibrate

from ..conftest import ALONE, attachment_of, config_of, make_deltas, make_model, with_lora


def samples(count, seed, response=6):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(5, 300, (8 + i % 5 + response,), generator=generator).tolist()
        made.append(Sample(ids, [position >= len(ids) - response for position in range(len(ids))]))
    return made


def calibration_set():
    return CalibrationSet(
        harmful=Split(samples(6, 1), samples(3, 2)),
        task=Split(samples(6, 3), samples(3, 4)),
        benign=Split(samples(4, 5), samples(2, 6)),
    )


def run(model, deltas, data=None, **values):
    config = config_of(**{"vector": "v", "max_utility_loss": 10.0, "utility_weight": 0.1, **values})
    return recalibrate(attachment_of(model, deltas), data or calibration_set(), config, 0)


def helpful_deltas(model, data, step=1.0, layers=(1, 2), rank=8):
    """Deltas that do lower the refusal loss: −gradient of it, truncated."""
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in layers]
    weights = [model.get_submodule(name).weight for name in names]
    loss = sum(
        losses.cross_entropy(model, b).sum()
        for b in batches(data.harmful.fit + data.harmful.held_out, 4, 0, model.device)
    )
    deltas = {}
    for name, gradient in zip(names, torch.autograd.grad(loss, weights), strict=True):
        u, s, vh = torch.linalg.svd(-gradient / gradient.norm())
        deltas[name] = LowRankDelta(s[:rank, None] * vh[:rank] * step, u[:, :rank])
    return deltas


def test_padding_and_kept_logits_do_not_change_the_loss():
    model = make_model()
    group = samples(5, 1)
    expected = []
    for sample in group:
        ids = torch.tensor([sample.input_ids])
        start = sample.is_response.index(True)
        expected.append(
            F.cross_entropy(
                model(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="sum"
            ).item()
        )
    (batch,) = batches(group, 8, 0, model.device)
    assert batch.kept < batch.input_ids.shape[1]
    assert losses.cross_entropy(model, batch).tolist() == pytest.approx(expected, rel=1e-5)


def test_kl_is_zero_for_the_same_model_and_positive_for_another():
    model, other = make_model(), make_model(seed=1)
    (batch,) = batches(samples(3, 1), 8, 0, model.device)
    with torch.no_grad():
        reference = F.log_softmax(response_logits(model, batch)[0], dim=-1)
        assert divergence(model, batch, reference).abs().sum().item() == pytest.approx(
            0.0, abs=1e-4
        )
        found = divergence(other, batch, reference)
        assert found.shape == (3,) and found.sum().item() > 1.0
        (alone,) = batches(samples(3, 1)[1:2], 8, 0, model.device)
        reference = F.log_softmax(response_logits(model, alone)[0], dim=-1)
        assert divergence(other, alone, reference).item() == pytest.approx(
            found[1].item(), rel=1e-4
        )


def test_softened_divergence_is_its_formula():
    torch.manual_seed(0)
    old, new = (3 * torch.randn(5, 40)).log_softmax(-1), (3 * torch.randn(5, 40)).log_softmax(-1)
    (batch,) = batches(
        [Sample([1, 2, 3, 4, 5, 6], [False] + [True] * 5)], 1, 0, torch.device("cpu")
    )
    with patch.object(losses, "_forward", return_value=F.pad(new[None], (0, 0, 0, 1))):
        plain, found = (
            divergence(make_model(), batch, old),
            divergence(make_model(), batch, old, temperature=3.0),
        )
    expected = 0.0
    for p, q in zip(old, new, strict=True):
        likely = p.argsort(descending=True)[:16]
        p_soft, q_soft = (p[likely] / 3).softmax(-1), (q[likely] / 3).softmax(-1)
        expected += 9 * float((p_soft * (p_soft / q_soft).log()).sum())
    assert (found - plain).item() == pytest.approx(expected, rel=1e-5)


def test_softened_divergence_sees_sure_answers_move():
    """A shift of the log-odds by 1 where the fine-tune is sure: next to nothing to KL, more than
    thirty times as much with T = 2.
    """
    sure = torch.full((1, 40), -30.0)
    sure[0, :2] = torch.tensor([8.0, 0.0])
    moved = sure.clone()
    moved[0, 1] += 1.0
    (batch,) = batches([Sample([1, 2], [False, True])], 1, 0, torch.device("cpu"))
    with patch.object(losses, "_forward", return_value=F.pad(moved[None], (0, 0, 0, 1))):
        plain, soft = (
            divergence(make_model(), batch, sure.log_softmax(-1), t).item() for t in (1.0, 2.0)
        )
    assert plain < 3e-4 and soft > 30 * plain


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_matches_finite_differences(temperature):
    model = make_model()
    deltas = make_deltas(model)
    config = config_of(
        vector="v",
        utility_weight=0.7,
        utility_temperature=temperature,
        sparsity_weight=0.2,
        batch_size=3,
    )
    attach = attachment_of(model, deltas).applied
    point = np.array([0.4, 0.6])

    def evaluate(at):
        value, losses, gradient, _ = evaluate_objective(model, fit, attach, at, config)
        assert value == pytest.approx(
            losses.safety + losses.benign + 0.7 * losses.utility + 0.2 * at.sum()
        )
        return value, gradient

    with frozen_for_calibration(model):
        fit = Objective(model, calibration_set(), "fit", config, Passes(0, 3), ALONE)
        _, gradient = evaluate(point)
        for i in range(2):
            step = np.eye(2)[i] * 0.02
            slope = (evaluate(point + step)[0] - evaluate(point - step)[0]) / 0.04
            assert slope == pytest.approx(gradient[i], rel=2e-2, abs=2e-3)


def test_the_divergences_matrix_foretells_it_along_the_line_to_its_minimum():
    """`½ λᵀBλ` with the first matrix `B`, against the divergence itself; outer products of its
    gradients would be far off.
    """
    model = make_model()
    deltas = make_deltas(model)
    attach = attachment_of(model, deltas).applied
    config = config_of(vector="v", utility_weight=2.0, batch_size=3)
    data = replace(calibration_set(), benign=None)
    with frozen_for_calibration(model):
        fit = Objective(model, data, "fit", config, Passes(0, 3), ALONE)
        for point in (np.array([0.01, 0.02]), np.array([0.03, 0.0])):
            _, losses, _, rows = evaluate_objective(model, fit, attach, point, config)
            harmful = fit.gradients(model, attach, point)[1]["safety"]
            curvature = rows.T @ rows - harmful.weight * harmful.gradients.T @ harmful.gradients
            assert point @ curvature @ point / 2 == pytest.approx(2.0 * losses.utility, rel=0.1)


@pytest.mark.parametrize("lora", [True, False])
def test_helpful_vector_is_taken_on(lora):
    model = make_model()
    data = calibration_set()
    deltas = helpful_deltas(model, data)
    result = run(with_lora(model) if lora else model, deltas, data)
    assert result.accepted and result.scale == 1.0
    assert set(result.coefficients) == {"layers.1", "layers.2"}
    assert result.held_out_after.safety < result.held_out_before.safety
    assert result.held_out_before.utility == pytest.approx(0.0, abs=1e-5)
    assert result.history[-1]["objective"] <= result.history[0]["objective"]
    assert all(0.0 <= value <= 2.0 for value in result.coefficients.values())


def test_runs_are_deterministic_and_leave_the_model_alone():
    model = with_lora(make_model())
    model.train()
    data = calibration_set()
    deltas = helpful_deltas(make_model(), data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = run(model, deltas, data), run(model, deltas, data)
    assert first.coefficients == second.coefficients
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    json.dumps(first.history)


def test_budget_shrinks_the_coefficients():
    model = make_model()
    data = replace(calibration_set(), benign=None)
    deltas = helpful_deltas(model, data, step=3.0)
    free = run(model, deltas, data)
    tight = run(model, deltas, data, max_utility_loss=free.held_out_after.utility * 0.5)
    assert tight.accepted and tight.scale < 1.0 and "Shrunk" in tight.reason
    assert tight.held_out_after.utility <= free.held_out_after.utility * 0.5
    for name, value in tight.coefficients.items():
        assert value == pytest.approx(free.coefficients[name] * tight.scale, rel=1e-6)


def test_no_budget_is_a_rejection_with_the_reason():
    model = make_model()
    data = calibration_set()
    result = run(model, helpful_deltas(model, data), data, max_utility_loss=0.0)
    assert not result.accepted
    assert "task divergence" in result.reason and set(result.coefficients.values()) == {0.0}


def test_harmful_direction_is_rejected_or_left_out():
    model = make_model()
    data = calibration_set()
    against = {
        name: LowRankDelta(-delta.a, delta.b) for name, delta in helpful_deltas(model, data).items()
    }
    result = run(model, against, data)
    assert not result.accepted or max(result.coefficients.values()) < 0.05


def test_bounds_are_kept():
    model = make_model()
    data = calibration_set()
    result = run(model, helpful_deltas(model, data), data, min_coefficient=0.1, max_coefficient=0.2)
    assert all(0.1 <= value <= 0.2 for value in result.coefficients.values())


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float32, "^The fine-tune has diverged"),
        (torch.float16, "may be too large for float16, so load it in bfloat16 or float32"),
    ],
)
def test_diverged_model_is_an_error(dtype, said):
    model = make_model()
    deltas = make_deltas(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(RecalibrationError, match=said):
        run(model.to(dtype), deltas)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_gradient_that_is_no_number_is_told_from_such_a_loss():
    model, data = make_model(), calibration_set()
    deltas = helpful_deltas(model, data)

    def nan_backward(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)

    model.lm_head.register_forward_hook(nan_backward)
    with pytest.raises(RecalibrationError, match=r"its gradient is not.*batch_size: 1"):
        run(model, deltas, data)


def recompute(model, reentrant):
    """Transformers has renamed it."""
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_layers_are_recomputed_where_the_training_did_so(lora, reentrant):
    def counted(checkpointing):
        """Coefficients, evaluations, and forward passes of a layer's part."""
        model = with_lora(make_model()) if lora else make_model()
        if checkpointing:
            recompute(model, reentrant)
        model.train()
        layer = base_model(model).model.layers[1]
        passes = []
        handle = layer.mlp.register_forward_pre_hook(lambda *args: passes.append(1))
        before = getattr(layer, "_gradient_checkpointing_func", None)
        result = run(model, deltas, data, max_evaluations=3)
        handle.remove()
        assert getattr(layer, "_gradient_checkpointing_func", None) is before and layer.training
        return result, len(passes)

    data = calibration_set()
    deltas = helpful_deltas(make_model(), data)
    (plain, passes), (recomputed, more) = counted(False), counted(True)
    assert recomputed.coefficients == plain.coefficients and recomputed.history == plain.history
    assert more == passes + 2 * len(plain.history)  # 16 samples in batches of 8


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("room", ["plenty", "runs out", "set by hand"])
def test_activations_are_kept_where_memory_allows_and_else_recomputed(room, lora, monkeypatch):
    """On a device whose memory is simulated: it is for batches of 4, and where it runs out, for 2."""

    def found(checkpointing, **values):
        model = with_lora(make_model()) if lora else make_model()
        if checkpointing:
            recompute(model, False)
        passes = []
        layer = base_model(model).model.layers[1]

        def forward(module, args):
            if room == "runs out" and len(args[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            passes.append(1)

        with layer.mlp.register_forward_pre_hook(forward):
            return run(model, deltas, data, max_evaluations=3, **values), len(passes)

    data = calibration_set()
    deltas = helpful_deltas(make_model(), data)
    for module in (recalibration, batch_size):
        monkeypatch.setattr(module, "has_own_memory", lambda device: True)
    monkeypatch.setattr(batch_size, "LARGEST", 4)
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 2**40)
    values = {"batch_size": 4} if room == "set by hand" else {}
    (plain, fewest), (result, passes) = found(False, **values), found(True, **values)
    size = 2 if room == "runs out" else 4
    assert (result.passes["batch_size"], result.passes["first_batch_size"]) == (size, 4)
    assert result.passes["activations"] == ("kept" if room == "plenty" else "recomputed")
    # of a layer: it is passed once more where it is recomputed
    assert (passes == fewest) == (room == "plenty")
    assert plain.passes["activations"] == "kept" and result.coefficients == plain.coefficients
    assert result.passes["batch_size_set"] == (room == "set by hand")


def test_layers_with_dropout_of_their_own_are_not_put_in_training_mode():
    model = make_model()
    recompute(model, False)
    model.model.layers[1].dropout = 0.1  # as OPT's decoder layer has it
    model.eval()
    with recomputing(model):
        assert [layer.training for layer in model.model.layers] == [True, False, True]
        assert not model.model.layers[0].mlp.training
    assert not any(module.training for module in model.modules())


def test_a_start_out_of_bounds_is_taken_to_the_nearest_bound():
    model = make_model()
    attachment = attachment_of(model, make_deltas(model))
    config = config_of(vector="v", max_evaluations=1, max_coefficient=0.7, min_coefficient=0.1)
    start = dict.fromkeys(attachment.space.names, 5.0) | {attachment.space.names[0]: 0.0}
    found = recalibrate(attachment, calibration_set(), config, 0, start=start)
    assert list(found.history[0]["coefficients"].values()) == [0.1, *[0.7] * (len(start) - 1)]


@pytest.mark.parametrize(
    ("safety", "accepted"), [(1.0, False), (1.1, False), (float("nan"), False), (0.999, True)]
)
def test_safety_that_stays_as_it_was_is_not_better(safety, accepted):
    before, after = Losses(1.0, 0.5, 0.0), Losses(safety, 0.5, 0.0)
    assert bool(recalibration.objection(before, after, budget=0.1)) is not accepted
