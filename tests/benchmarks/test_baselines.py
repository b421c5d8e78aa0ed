"""Each baseline against its formula, written out on small matrices."""

import math

import pytest
import torch

from benchmarks.baselines import norm
from benchmarks.baselines.antidote import antidote
from benchmarks.baselines.controls import random_layers, random_vector
from benchmarks.baselines.enchtable import enchtable
from benchmarks.baselines.few_shot import adapter_updates, few_shot_update
from benchmarks.baselines.moments import input_moments
from benchmarks.baselines.projection import alignment_matrix, projected
from benchmarks.baselines.resta import resta
from benchmarks.baselines.safe_delta import compensated, damped, safe_delta
from benchmarks.baselines.safelora import safelora
from benchmarks.baselines.safemerge import safemerge
from benchmarks.baselines.salora import SaLoRALinear, insert, safety_basis, task_start
from safegene_trl.data.calibration import CalibrationSet, Split
from safegene_trl.models.inputs import Sample
from safegene_trl.models.low_rank import LowRankDelta

from ..conftest import make_deltas, make_model, with_lora


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_norm_is_over_all_modules():
    assert norm({"a": torch.full((2, 2), 3.0), "b": torch.full((1, 1), 8.0)}) == pytest.approx(10.0)


def test_alignment_matrix_is_no_projector():
    v = matrix(6, 4)
    p = alignment_matrix(v)
    torch.testing.assert_close(p, v @ v.T / v.norm())
    assert not torch.allclose(p @ p, p)
    assert float(p.trace()) / 6 == pytest.approx(float(v.norm()) / 6, rel=1e-5)
    assert not alignment_matrix(torch.zeros(3, 2)).any()


def test_safelora_projects_what_lies_away_and_the_lowest():
    along = torch.diag(torch.tensor([1.0, 0.0]))
    alignment = {"away": along, "near": along, "nearest": along}
    update = {
        "away": torch.tensor([[0.1], [1.0]]),
        "near": torch.tensor([[1.0], [0.8]]),
        "nearest": torch.tensor([[1.0], [0.0]]),
    }
    assert projected(update["near"], along)[1] == pytest.approx(1 / math.sqrt(1 + 0.64))
    found = safelora(update, alignment, threshold=0.5, least=0)
    torch.testing.assert_close(found["away"], torch.tensor([[0.1], [0.0]]))
    assert found["near"] is update["near"] and found["nearest"] is update["nearest"]
    found = safelora(update, alignment, threshold=0.5, least=2)
    torch.testing.assert_close(found["near"], torch.tensor([[1.0], [0.0]]))
    assert found["nearest"] is update["nearest"]
    assert projected(torch.zeros(2, 1), along)[1] == 0.0


def test_safemerge_merges_products_not_factors():
    along = torch.diag(torch.tensor([1.0, 0.0]))
    update = {"away": torch.tensor([[0.0], [1.0]]), "near": torch.tensor([[1.0], [0.0]])}
    safety = {"away": torch.tensor([[5.0], [0.0]]), "near": torch.tensor([[5.0], [0.0]])}
    found = safemerge(update, safety, dict.fromkeys(update, along))
    torch.testing.assert_close(found["away"], torch.tensor([[1.0], [0.8]]))
    assert found["near"] is update["near"]


def test_resta_adds_the_vector_and_dare_keeps_the_mean():
    update, vector = (
        {"a": torch.ones(200, 200), "b": torch.ones(2, 2)},
        {"a": torch.full((200, 200), 2.0)},
    )
    plain = resta(update, vector, weight=0.5)
    torch.testing.assert_close(plain["a"], torch.full((200, 200), 2.0))
    torch.testing.assert_close(plain["b"], update["b"])
    dropped = resta(update, {}, drop=0.3, seed=1)["a"]
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(dropped, resta(update, {}, drop=0.3, seed=1)["a"])


def test_enchtable_weighs_by_interference():
    task = {
        "m": LowRankDelta(matrix(2, 5), matrix(4, 2, seed=1)),
        "alone": LowRankDelta(matrix(2, 5), matrix(4, 2)),
    }
    vector = {"m": LowRankDelta(matrix(2, 5, seed=2) * 1e-2, matrix(4, 2, seed=3) * 1e-2)}
    found = enchtable(task, vector)
    tau, delta = task["m"].dense(), vector["m"].dense()
    (u1, s1, v1), (u2, s2, v2) = (
        (u[:, :2], s[:2], vh[:2].T) for u, s, vh in map(torch.linalg.svd, (tau, delta))
    )
    u, v = torch.cat((u1, u2), dim=1), torch.cat((v1, v2), dim=1)
    m = (u.T @ u - torch.eye(4)) @ torch.diag(torch.cat((s1, s2))) @ (v.T @ v - torch.eye(4))
    alpha = (
        0.1 * math.sqrt(tau.norm() ** 2 + task["alone"].dense().norm() ** 2) / float(delta.norm())
    )
    expected = tau + math.exp(-200 * float(m.abs().mean())) * alpha * delta
    torch.testing.assert_close(found["m"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["alone"], task["alone"].dense())


def test_safe_delta_compensation_is_the_cheapest():
    x = matrix(40, 6)
    moment, update = x.T @ x / 40, matrix(3, 6, seed=1)
    taken = torch.tensor([True, False, True, False, False, True])
    found = compensated(update, moment, taken)
    torch.testing.assert_close(found[:, taken], update[:, taken])
    hessian = damped(moment)

    def cost(change):
        return float(((change @ hessian) * change).sum() / 2)

    for seed in range(20):  # no other change of the free columns costs less
        other = found.clone()
        other[:, ~taken] += 0.1 * matrix(3, 3, seed=seed)
        assert cost(other) > cost(found)
    free = found.clone().requires_grad_()
    gradient = torch.autograd.grad(((free @ hessian) * free).sum() / 2, free)[0]
    assert float(gradient[:, ~taken].abs().max()) < 1e-5


def test_safe_delta_takes_cheap_columns_within_the_budget():
    moment = torch.diag(torch.tensor([100.0, 1.0, 0.01]))
    update = {"m": torch.ones(2, 3)}
    found = safe_delta(update, {"m": moment}, budget=0.1)["m"]
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 1.0]] * 2))
    assert torch.equal(safe_delta(update, {"m": moment}, budget=1.0)["m"], update["m"])
    assert not safe_delta(update, {"m": moment}, budget=0.0)["m"].any()


def test_antidote_prunes_what_harmful_data_uses():
    aligned = {"m": torch.tensor([[1.0, 1.0], [3.0, 1.0]])}
    update = {"m": torch.tensor([[0.5, 0.5], [-1.0, 0.5]])}
    # weights 1.5 1.5 / 2 1.5, inputs 1 and 10
    moments = {"m": torch.diag(torch.tensor([1.0, 100.0]))}
    found = antidote(update, aligned, moments, share=0.5)
    torch.testing.assert_close(aligned["m"] + found["m"], torch.tensor([[1.5, 0.0], [2.0, 0.0]]))
    assert torch.equal(antidote(update, aligned, moments, share=0.0)["m"], update["m"])


def test_salora_output_keeps_out_of_the_safety_directions():
    base = torch.nn.Linear(5, 6, bias=False)
    x_safe, x_task = matrix(50, 5), matrix(50, 5, seed=1)
    basis = safety_basis(base.weight.detach(), x_safe.T @ x_safe, rank=2)
    _, _, vh = torch.linalg.svd(x_safe @ base.weight.detach().T)
    torch.testing.assert_close(basis @ basis.T, vh[:2].T @ vh[:2], atol=1e-4, rtol=1e-4)
    weight = base.weight.detach()
    a, b = task_start(weight, x_task.T @ x_task, rank=3, directions=4)
    u, s, zh = torch.linalg.svd(weight)
    _, _, vh = torch.linalg.svd(x_task @ weight.T)
    torch.testing.assert_close(
        b @ a, vh[:4].T @ vh[:4] @ (u[:, :3] * s[:3]) @ zh[:3], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(a @ a.T, torch.diag(s[:3]), atol=1e-4, rtol=1e-4)
    layer = SaLoRALinear(base, basis, a, b)
    x = matrix(7, 5, seed=2)
    torch.testing.assert_close(layer(x), base(x))  # as it was at the start
    with torch.no_grad():
        layer.a += matrix(3, 5, seed=3)
        layer.b += matrix(6, 3, seed=4)
    update = layer.update()
    torch.testing.assert_close(layer(x), x @ (base.weight + update).T, atol=1e-5, rtol=1e-4)
    assert float((basis.T @ update).abs().max()) < 1e-5
    assert int(torch.linalg.matrix_rank(update, atol=1e-4)) <= 6
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"a", "b"}


def test_salora_goes_into_a_model_and_leaves_it_as_it_was():
    model, name = make_model(), "model.layers.1.mlp.down_proj"
    ids = torch.arange(8)[None]
    before = model(ids).logits
    moments = {name: torch.eye(48)}
    layers = insert(model, moments, moments, rank=2)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)
    assert sum(p.requires_grad for p in model.parameters()) == 2 and list(layers) == [name]


def test_moments_are_those_of_the_inputs():
    model, name = make_model(), "model.layers.1.self_attn.q_proj"
    samples = [Sample([5, 6, 7, 8], [False, False, True, True]), Sample([9, 10], [False, True])]
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda m, inputs, output: seen.append(inputs[0][0])
    )
    for sample in samples:
        model(torch.tensor([sample.input_ids]))
    handle.remove()
    everything = torch.cat(seen)
    found = input_moments(model, [name], samples, pad_id=0)[name]
    torch.testing.assert_close(found, everything.T @ everything / 6, atol=1e-4, rtol=1e-3)
    predicting = torch.cat((seen[0][1:3], seen[1][:1]))
    found = input_moments(model, [name], samples, pad_id=0, responses_only=True)[name]
    torch.testing.assert_close(found, predicting.T @ predicting / 3, atol=1e-4, rtol=1e-3)


def test_random_vector_has_the_norms_of_the_real_one():
    real = make_deltas(make_model())
    found = random_vector(real, seed=0)
    for name, delta in real.items():
        assert float(found[name].dense().norm()) == pytest.approx(
            float(delta.dense().norm()), rel=1e-4
        )
        cosine = delta.inner(found[name]) / delta.inner(delta)
        assert abs(cosine) < 0.5
    chosen = random_layers(list(range(10)), 5, seed=0)
    assert len(set(chosen)) == 5 and chosen == random_layers(list(range(10)), 5, seed=0) == sorted(
        chosen
    )


def test_few_shot_lora_learns_its_shots():
    model = make_model()
    sample = Sample([5, 6, 7, 8, 9], [False, False, True, True, True])
    shots = CalibrationSet(Split([sample], [sample]), Split([sample], [sample]))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def loss(m):
        logits = m(torch.tensor([sample.input_ids])).logits[0, 1:4]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8, 9])))

    before = loss(model)
    update = few_shot_update(
        model, shots, pad_id=0, rank=4, steps=60, learning_rate=3e-3
    )
    plain = make_model()
    with torch.no_grad():
        for name, matrix_ in update.items():
            plain.get_submodule(name).weight += matrix_
    assert loss(plain) < before - 1
    assert {name for name, _ in model.named_parameters()} == set(weights)
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name])


def test_update_of_an_adapter():
    model = with_lora(make_model())
    name = "model.layers.0.mlp.up_proj"
    found = adapter_updates(model)
    layer = model.get_submodule(f"base_model.model.{name}")
    expected = (
        layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    torch.testing.assert_close(found[name], expected)
    assert len(found) == 3 * 7
