"""The touch-up: what it learns, when it is taken, and that the model comes out as it went in."""

import math
from contextlib import contextmanager

import pytest
import torch

from safegene_trl.data.calibration import CalibrationSet, Split
from safegene_trl.models.attachment import frozen_for_calibration
from safegene_trl.models.trained_deltas import TrainedDeltas
from safegene_trl.recalibration import touch_up as touching
from safegene_trl.recalibration.objective import Objective, Passes, term_weights
from safegene_trl.recalibration.search import recalibrate
from safegene_trl.recalibration.touch_up import train_touch_up

from ..conftest import ALONE, attachment_of, config_of, make_model, with_lora
from .test_search import calibration_set, helpful_deltas, recompute


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """At a rate at which a tiny model moves within a few steps."""
    monkeypatch.setattr(touching, "LEARNING_RATE", 3e-2)
    monkeypatch.setattr(touching, "STEPS", 16)


def learnable():
    """Held out are some of the samples that are fitted on: random others teach nothing."""
    data = calibration_set()
    splits = (Split(own.fit, own.fit[:3]) for own in (data.harmful, data.task, data.benign))
    return CalibrationSet(*splits)


def settings(**values):
    return config_of(**{"vector": "v", "max_utility_loss": 10.0, "utility_weight": 0.1} | values)


def searched(model, deltas, data, **values):
    attachment = attachment_of(model, deltas)
    return attachment, recalibrate(attachment, data, settings(max_evaluations=3, **values), 0)


@contextmanager
def both(attachment, found, more):
    """The vector as it was found and what a touch-up adds, beside the weights."""
    values = attachment.space.values(found.coefficients)
    with attachment.applied(values):
        if not more:
            yield
            return
        other = attachment_of(attachment.model, more, "rank")
        with other.applied(torch.ones(len(other.space.names))):
            yield


def trained(model, deltas, data, ship=None, **values):
    attachment, found = searched(model, deltas, data, **values)
    ship = ship or (lambda more: both(attachment, found, more))
    made = train_touch_up(attachment, data, settings(**values), 0, found, ship)
    return found, made


def test_it_lowers_the_held_out_objective_and_is_what_is_shipped():
    model, data = make_model(), learnable()
    deltas = helpful_deltas(model, data)
    found, made = trained(model, deltas, data)
    path = dict(made.held_out_by_step)
    assert made.accepted and "lower than with the vector alone" in made.reason
    assert list(path) == [0, 8, 16] and min(path.values()) < path[0] - 0.01
    assert set(made.deltas) == set(deltas)
    for name, delta in made.deltas.items():
        assert delta.a.shape == (8, deltas[name].a.shape[1]) and delta.a.dtype == torch.float32
        assert delta.b.shape == (deltas[name].b.shape[0], 8) and bool(delta.b.any())
    attachment, config = attachment_of(model, deltas), settings()
    with frozen_for_calibration(model):
        held_out = Objective(model, data, "held_out", config, Passes(0), ALONE)
        for more, expected in (({}, path[0]), (made.deltas, min(path.values()))):
            with both(attachment, found, more):
                losses = held_out.losses(model, 2.0).to_dict()
            weights = term_weights(config)
            value = sum(weights[term] * loss for term, loss in losses.items())
            assert value == pytest.approx(expected, rel=1e-4)


def test_runs_are_deterministic_and_leave_the_model_alone():
    data, model = learnable(), with_lora(make_model(), lora_dropout=0.5)
    deltas = helpful_deltas(make_model(), data)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    (_, first), (_, second) = trained(model, deltas, data), trained(model, deltas, data)
    assert first.accepted and first.held_out_by_step == second.held_out_by_step
    for name, delta in first.deltas.items():
        assert torch.equal(delta.a, second.deltas[name].a)
        assert torch.equal(delta.b, second.deltas[name].b)
    (_, other) = trained(model, deltas, data, seed=1)
    assert other.held_out_by_step[0] == first.held_out_by_step[0]
    assert other.held_out_by_step[1] != first.held_out_by_step[1]
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_gradient_is_that_of_the_objective():
    """Against finite differences along itself, in batches of all sizes."""
    model, data = make_model(), calibration_set()
    deltas, config = helpful_deltas(model, data), settings(utility_temperature=2.0)
    generator = torch.Generator().manual_seed(0)
    factors = TrainedDeltas(model, deltas, 4, generator, torch.device("cpu"))
    with torch.no_grad():
        for each in factors.parameters:
            each.add_(0.1 * torch.randn(each.shape, generator=generator))
    found = []
    for size in (3, 8):
        with frozen_for_calibration(model):
            fit = Objective(model, data, "fit", config, Passes(0, size), ALONE)
            with factors.applied():
                value, gradient = fit.gradient_by(model, factors.parameters, term_weights(config))
                found.append(gradient)
                losses = fit.losses(model, 2.0).to_dict()
        weighted = sum(term_weights(config)[term] * loss for term, loss in losses.items())
        assert value == pytest.approx(weighted, rel=1e-5)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    start, step = factors.values, 1e-2 * found[1] / found[1].norm()

    def at(numbers):
        with torch.no_grad():
            for each, own in zip(factors.parameters, factors.shaped(numbers), strict=True):
                each.copy_(own)
        with frozen_for_calibration(model), factors.applied():
            losses = fit.losses(model, 2.0).to_dict()
        return sum(term_weights(config)[term] * loss for term, loss in losses.items())

    slope = (at(start + step) - at(start - step)) / 0.02
    assert slope == pytest.approx(float(found[1].norm()), rel=1e-2)


def test_every_step_has_a_few_samples_of_every_term(monkeypatch):
    monkeypatch.setattr(touching, "PER_TERM", 3)
    counts = []

    class Counted(Objective):
        def __init__(self, model, data, side, *rest):
            if side == "fit":
                splits = (data.harmful, data.task, data.benign)
                counts.append([tuple(map(id, split.fit)) for split in splits])
            super().__init__(model, data, side, *rest)

    monkeypatch.setattr(touching, "Objective", Counted)
    model, data = make_model(), learnable()
    trained(model, helpful_deltas(model, data), data)
    assert len(counts) == 16 and all([len(own) for own in step] == [3, 3, 3] for step in counts)
    assert len({step[0] for step in counts}) > 8


def test_what_held_out_shots_do_not_bear_out_is_not_taken():
    """Random samples say nothing of each other."""
    model, data = make_model(), calibration_set()
    _, made = trained(model, helpful_deltas(model, data), data)
    assert not made.accepted and not made.deltas and made.held_out is None
    assert made.reason == "no step of its training had a lower held-out objective than the start"


def test_the_rule_for_coefficients_decides():
    model, data = make_model(), learnable()
    deltas = helpful_deltas(model, data)
    _, made = trained(model, deltas, data, max_utility_loss=0.0)
    assert not made.accepted and "the held-out task divergence is" in made.reason
    assert made.held_out is not None and made.held_out.utility > 0


def test_it_is_taken_only_if_what_is_shipped_is_better_than_the_vector_alone():
    """As where rounding takes it away."""
    model, data = make_model(), learnable()
    deltas = helpful_deltas(model, data)
    attachment, found = searched(model, deltas, data)
    _, made = trained(model, deltas, data, ship=lambda more: both(attachment, found, {}))
    assert not made.accepted and "the held-out objective went from" in made.reason
    assert made.deltas


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_training_that_diverges_is_not_taken(what):
    """After three steps one of the two is no number."""
    model, data, steps = make_model(), learnable(), []
    deltas = helpful_deltas(model, data)
    attachment, found = searched(model, deltas, data)

    def diverging(module, inputs, output):
        if len(steps) < 3:
            return output
        if what == "loss":
            return output * math.nan
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)
        return output

    with model.lm_head.register_forward_hook(diverging):
        made = train_touch_up(
            attachment,
            data,
            settings(),
            0,
            found,
            lambda more: both(attachment, found, more),
            lambda: steps.append(1),
        )
    assert not made.accepted and not made.deltas and "has diverged" in made.reason
    assert len(steps) == 3 and [step for step, _ in made.held_out_by_step] == [0]


@pytest.mark.parametrize("largest", [2, 0])
def test_where_memory_runs_out_it_starts_again_with_smaller_batches(largest, caplog):
    model, data = make_model(), learnable()
    deltas = helpful_deltas(model, data)
    attachment, found = searched(model, deltas, data)

    def forward(module, args):
        if len(args[0]) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with model.model.layers[1].mlp.register_forward_pre_hook(forward):
        made = train_touch_up(
            attachment, data, settings(), 0, found, lambda more: both(attachment, found, more)
        )
    assert f"batches of {max(largest, 1)}" in caplog.text
    if largest:
        (_, plain) = trained(model, deltas, data)
        assert made.accepted
        for (_, one), (_, other) in zip(made.held_out_by_step, plain.held_out_by_step, strict=True):
            assert one == pytest.approx(other, rel=1e-3)
    else:
        assert not made.accepted and made.reason == "memory ran out with one sample at a time"
    assert not model.model.layers[1].mlp._forward_pre_hooks


def test_layers_are_recomputed_where_the_training_did_so():
    def counted(checkpointing):
        """The path, and forward passes of a layer's part."""
        model, passes = make_model(), []
        if checkpointing:
            recompute(model, True)
        model.train()
        attachment, found = searched(model, deltas, data)
        with model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: passes.append(1)):
            made = train_touch_up(
                attachment, data, settings(), 0, found, lambda more: both(attachment, found, more)
            )
        return made.held_out_by_step, len(passes)

    data = learnable()
    deltas = helpful_deltas(make_model(), data)
    (plain, passes), (recomputed, more) = counted(False), counted(True)
    assert plain == recomputed and more > passes


def test_in_16_bits_the_factors_are_trained_in_float32():
    model, data = make_model().to(torch.bfloat16), learnable()
    deltas = helpful_deltas(make_model(), data)
    _, made = trained(model, deltas, data)
    assert made.accepted
    assert {t.dtype for d in made.deltas.values() for t in (d.a, d.b)} == {torch.float32}
