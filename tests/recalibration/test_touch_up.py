"""The touch-up: what it learns, when it is taken, and that the model comes out as it went in."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from safegene_trl.models import batch_size
from safegene_trl.models.attachment import frozen_for_calibration
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.recalibration import touch_up as touching
from safegene_trl.recalibration.objective import Losses, Objective, Passes, term_weights
from safegene_trl.recalibration.search import recalibrate
from safegene_trl.recalibration.touch_up import train_touch_up

from ..conftest import ALONE, attachment_of, config_of, make_deltas, make_model, with_lora
from .test_search import calibration_set, helpful_deltas, recompute


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """At a rate at which a tiny model moves within a few steps."""
    monkeypatch.setattr(touching, "LEARNING_RATE", 3e-2)
    monkeypatch.setattr(touching, "STEPS", 16)


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
    model, data = make_model(), calibration_set()
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
