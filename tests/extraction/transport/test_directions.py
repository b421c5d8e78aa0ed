"""A direction of harm is told from one of chance."""

import numpy as np
import pytest

from safegene_trl import SafeGeneError
from safegene_trl.extraction.transport.directions import (
    check_enough,
    cosine,
    layer_direction,
    spread_of,
)

from .arrays import rows


def test_a_planted_direction_and_its_size():
    draw = np.random.default_rng(0)
    planted = draw.standard_normal(50)
    harmful, benign = draw.standard_normal((64, 50)) + planted, draw.standard_normal((64, 50))
    found = layer_direction(harmful, benign, 2.0, seed=0)
    assert cosine(found.vector, planted) > 0.95 and found.agreement > 0.9
    assert found.harmful.mean() - found.benign.mean() == pytest.approx(found.size)
    assert found.size == pytest.approx(np.linalg.norm(found.vector) / 2)


def test_between_prompts_of_one_kind_the_halves_do_not_agree():
    draw = np.random.default_rng(0)
    found = layer_direction(*draw.standard_normal((2, 64, 50)), 1.0, seed=0)
    assert abs(found.agreement) < 0.2


def test_models_that_do_not_differ_have_no_direction():
    found = layer_direction(np.zeros((8, 5)), np.zeros((8, 5)), 1.0, seed=0)
    assert found.agreement == 0 and found.size == 0 and not found.harmful.any()


def test_the_spread_is_read_in_blocks(tmp_path):
    values = np.random.default_rng(0).standard_normal((700, 6)) * 3 + 10
    expected = np.sqrt(((values - values.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert spread_of(rows(tmp_path, "s", values)) == pytest.approx(expected, rel=1e-5)


def test_too_few_prompts_are_named():
    with pytest.raises(SafeGeneError, match="`benign_data` gives 7 prompts"):
        check_enough(["x"] * 8, ["x"] * 7)
