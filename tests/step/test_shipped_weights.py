"""Weights that stay in the live ones' place from where they are tried to where they are measured."""

from contextlib import contextmanager

import pytest
import torch

from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.errors import OutputError
from safegene_trl.step.shipped_weights import ShippedWeights, TriedRounding, merged_weights

from ..conftest import ALONE, make_deltas, make_model


@pytest.fixture
def told():
    return []


@pytest.fixture
def weights(told):
    @contextmanager
    def put(added):
        values = added.coefficients["layer"].tolist()
        told.append(("put", *values))
        try:
            yield
        finally:
            told.append(("back", *values))

    return ShippedWeights(put)


DELTAS = {}


def at(value, deltas=DELTAS):
    return ScaledVector(deltas, {"layer": torch.tensor([value])})


def test_the_same_coefficients_are_put_once(weights, told):
    for _ in range(2):
        with weights.of(at(1.0)):
            pass
    assert told == [("put", 1)]
    with weights.of(at(2.0)):
        assert told == [("put", 1), ("back", 1), ("put", 2)]
    weights.close()
    weights.close()
    assert told[3:] == [("back", 2)]
    with weights.of(at(2.0)):
        pass
    assert told[4:] == [("put", 2)]
    with weights.of(at(2.0, deltas=dict(DELTAS))):  # something else, with the same coefficients
        assert told[5:] == [("back", 2), ("put", 2)]
    weights.close()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_after_an_error_the_live_weights_are_back_at_once(error, weights, told):
    with pytest.raises(error), weights.of(at(1.0)):
        raise error
    assert told == [("put", 1), ("back", 1)]
    with weights.of(at(1.0)):
        assert told[2:] == [("put", 1)]
    weights.close()


def test_weights_that_are_not_finite_are_refused_once_they_are_taken():
    """While they are only tried, the losses speak."""
    model = make_model().half()
    deltas = make_deltas(model)
    rounding = TriedRounding()
    vector = ScaledVector(deltas, dict.fromkeys(deltas, 1e7))
    with merged_weights(model, vector, ALONE, rounding):
        assert not all(bool(tensor.isfinite().all()) for tensor in model.parameters())
    with pytest.raises(OutputError, match=r"`model\.layers\.1.* would hold NaN or infinity"):
        rounding.check()
    assert all(bool(tensor.isfinite().all()) for tensor in model.parameters())
