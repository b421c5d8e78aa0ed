"""Each baseline against its formula, written out on small matrices."""

import math

import pytest
import torch

from benchmarks.baselines import norm, one_shot
from benchmarks.baselines.antidote import antidote
from benchmarks.baselines.controls import random_layers, random_vector
from benchmarks.baselines.enchtable import enchtable
from benchmarks.baselines.few_shot import adapter_updates, few_shot_update
from benchmarks.baselines.few_shot_tuned import losses_by_steps, tuned_few_shot_update
from benchmarks.baselines.held_out import held_out_loss, lowest
from benchmarks.baselines.lssf import lssf, safety_rank
from benchmarks.baselines.moments import input_moments, output_directions
from benchmarks.baselines.projection import alignment_matrix, projected
from benchmarks.baselines.resta import resta
from benchmarks.baselines.safe_delta import compensated, damped, safe_delta
from benchmarks.baselines.safelora import safelora
from benchmarks.baselines.safemerge import safemerge
from benchmarks.baselines.salora import SaLoRALinear, insert, safety_basis, task_start
from benchmarks.baselines.wise_ft import chosen_wise_ft, wise_ft
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
    update = few_shot_update(model, shots, pad_id=0, rank=4, steps=60, learning_rate=3e-3)
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


# What chooses its settings by the held-out shots.


def sample(*tokens, prompt=2):
    return Sample(list(tokens), [False] * prompt + [True] * (len(tokens) - prompt))


@pytest.fixture(scope="module")
def shots():
    return CalibrationSet(
        harmful=Split(
            [sample(5, 6, 7, 8, 9), sample(5, 7, 11, 9)], [sample(6, 5, 7, 8, 9), sample(6, 9, 8)]
        ),
        task=Split([sample(20, 21, 22)], [sample(23, 21, 22)]),
        benign=Split([sample(30, 31, 32, 33)], [sample(34, 31, 32, 33)]),
    )


@torch.no_grad()
def nats(model, samples):
    """Per response token."""
    found = []
    for one in samples:
        logits = model(torch.tensor([one.input_ids])).logits[0].log_softmax(dim=-1)
        found += [
            -logits[i - 1, one.input_ids[i]] for i, said in enumerate(one.is_response) if said
        ]
    return float(torch.stack(found).mean())


def plus(update):
    model = make_model(layers=2)
    with torch.no_grad():
        for name, matrix_ in update.items():
            model.get_submodule(name).weight += matrix_
    return model


def test_held_out_loss_is_the_sum_of_three_means(shots):
    model = make_model(layers=2)
    harmful, benign, task = (
        nats(model, split.held_out) for split in (shots.harmful, shots.benign, shots.task)
    )
    assert held_out_loss(model, shots, 0) == pytest.approx(harmful + benign + task, rel=1e-4)
    without = CalibrationSet(shots.harmful, shots.task)
    assert held_out_loss(model, without, 0) == pytest.approx(harmful + task, rel=1e-4)


def test_of_settings_the_first_with_the_lowest_loss():
    assert lowest({"a": 2.0, "b": 1.0, "c": 1.0}) == "b"
    assert lowest({"a": math.nan, "b": math.inf, "c": 9.0}) == "c"
    assert lowest({"a": math.nan}) == "a"


def test_few_shot_lora_is_tuned_on_what_it_did_not_learn(shots):
    seen = CalibrationSet(*(Split(s.fit, []) for s in (shots.harmful, shots.task, shots.benign)))
    model = make_model(layers=2)
    found = {}
    for rate in (1e-4, 3e-3):
        found |= {
            (steps, rate): loss
            for steps, loss in losses_by_steps(model, shots, 0, (1, 3), rate, 7).items()
        }
        for steps in (1, 3):
            update = few_shot_update(model, seen, 0, steps=steps, learning_rate=rate, seed=7)
            loss = held_out_loss(plus(update), shots, 0)
            assert found[steps, rate] == pytest.approx(loss, rel=1e-4)
    steps, rate = min(found, key=found.get)
    assert (steps, rate) == (3, 3e-3)  # so that neither the first nor an arbitrary one is right
    update, about = tuned_few_shot_update(model, shots, 0, (1, 3), (1e-4, 3e-3), seed=7)
    assert (about["steps"], about["learning_rate"]) == (steps, rate)
    assert about["held_out"]["3 steps at 0.003"] == pytest.approx(found[3, 3e-3], abs=1e-3)
    on_all = few_shot_update(model, shots, 0, steps=3, learning_rate=3e-3, seed=7)
    for name, matrix_ in update.items():
        torch.testing.assert_close(matrix_, on_all[name])


def test_one_shot_patch_learns_one_refusal(shots, monkeypatch):
    monkeypatch.setattr(one_shot, "RATE", 3e-3)
    monkeypatch.setattr(one_shot, "STEPS", 3)
    model = make_model(layers=2)
    nothing = Split([], [])
    alone = [
        few_shot_update(
            model, CalibrationSet(Split([refusal], []), nothing), 0, steps=3, learning_rate=3e-3
        )
        for refusal in shots.harmful.fit
    ]
    losses = [held_out_loss(plus(update), shots, 0) for update in alone]
    update, about = one_shot.one_shot_update(model, shots, 0)
    best = losses.index(min(losses))
    assert about["candidate"] == best and about["steps"] == 3
    assert about["held_out"] == pytest.approx(losses, abs=1e-3)
    for name, matrix_ in update.items():
        torch.testing.assert_close(matrix_, alone[best][name])
    before = nats(model, [shots.harmful.fit[best]])
    assert nats(plus(update), [shots.harmful.fit[best]]) < before - 0.1
    monkeypatch.setattr(one_shot, "ENOUGH", before + 9)  # there is nothing left to learn
    monkeypatch.setattr(one_shot, "CANDIDATES", 1)
    _, about = one_shot.one_shot_update(model, shots, 0)
    assert about["steps"] == 1 and len(about["held_out"]) == 1


def test_wise_ft_scales_by_the_best_of_the_grid():
    update = {"a": matrix(3, 4), "b": matrix(2, 2, seed=1)}
    half = wise_ft(update, 0.5)
    for name, matrix_ in update.items():
        torch.testing.assert_close(half[name], matrix_ / 2)
    found, about = chosen_wise_ft(
        update, lambda scaled: (float(scaled["a"][0, 0] / update["a"][0, 0]) - 0.7) ** 2
    )
    assert about["alpha"] == 0.75 and about["held_out"]["0.25"] == pytest.approx(0.2025)
    torch.testing.assert_close(found["b"], 0.75 * update["b"])


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (6, 4), (5, 5)])
def test_output_directions_are_those_of_the_outputs(rows, columns):
    weight, x = matrix(rows, columns), matrix(columns, 40, seed=1)
    u, s, _ = torch.linalg.svd(weight @ x / math.sqrt(40), full_matrices=False)
    directions, values = output_directions(weight, x @ x.T / 40)
    assert directions.shape == (rows, min(rows, columns))
    kept = values[: min(rows, columns)]
    torch.testing.assert_close(kept, s[: len(kept)], atol=1e-4, rtol=1e-3)
    for k in range(1, min(rows, columns)):
        torch.testing.assert_close(
            directions[:, :k] @ directions[:, :k].T, u[:, :k] @ u[:, :k].T, atol=1e-3, rtol=1e-3
        )


def test_rank_by_the_entropy_that_is_kept():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    shares = values**2 / 30
    terms = [-float(p * p.log()) for p in shares]
    for rank in (1, 2, 3):
        kept = sum(terms[:rank]) / sum(terms)
        assert safety_rank(values, kept - 1e-4) == rank
        assert safety_rank(values, kept + 1e-4) == rank + 1
    assert safety_rank(values, 1.0) == 4
    assert safety_rank(torch.tensor([2.0, 0.0]), 0.85) == 1


def test_lssf_adds_what_lies_in_the_safety_subspace():
    weight, x = matrix(6, 5), matrix(5, 50, seed=1) * torch.tensor([9.0, 4, 1, 0.1, 0.1])[:, None]
    update, vector = matrix(6, 5, seed=2), matrix(6, 5, seed=3)
    u, s, _ = torch.linalg.svd(weight @ x)
    rank = safety_rank(s, 0.85)
    assert 1 < rank < 5
    expected = update + 2.0 * u[:, :rank] @ u[:, :rank].T @ vector
    found, ranks = lssf(
        {"m": update, "alone": update},
        {"m": vector, "not tuned": vector},
        {"m": weight},
        {"m": x @ x.T / 50},
        weight=2.0,
    )
    assert ranks == {"m": rank} and set(found) == {"m", "alone"}
    torch.testing.assert_close(found["m"], expected, atol=1e-3, rtol=1e-3)
    assert found["alone"] is update


def test_baselines_take_16_bit_weights():
    """As a model on an accelerator has them; what they return is float32 all the same."""
    weight, x = matrix(6, 5).bfloat16(), matrix(5, 50, seed=1)
    moment, update = x @ x.T / 50, {"m": matrix(6, 5, seed=2)}
    assert antidote(update, {"m": weight}, {"m": moment}, 0.2)["m"].dtype == torch.float32
    assert lssf(update, update, {"m": weight}, {"m": moment})[0]["m"].dtype == torch.float32
    base = torch.nn.Linear(5, 6, bias=False, dtype=torch.bfloat16)
    basis = safety_basis(base.weight.detach(), moment, rank=2)
    layer = SaLoRALinear(base, basis, *task_start(base.weight.detach(), moment, 2))
    y = layer(x.T.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, base(x.T.bfloat16()))
    assert layer.update().dtype == torch.float32


def test_a_new_lora_in_a_16_bit_model_is_float32(shots):
    model = make_model(layers=2).bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    update = few_shot_update(model, shots, 0, steps=2, learning_rate=1e-4)
    # in bfloat16 steps of this size would be the same for most entries
    moved = update["model.layers.0.mlp.up_proj"]
    assert moved.dtype == torch.float32 and moved.unique().numel() > 0.9 * moved.numel()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
