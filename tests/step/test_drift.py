"""Refusals that get fewer from release to release: the tests against scipy's own, and the
sentences.
"""

import random

import pytest
from scipy.stats import fisher_exact, kendalltau

from safegene_trl.step.drift import chance_of_falling, chance_of_fewer, drift_warnings

from .test_history import release


def test_drift_is_told_from_chance():
    assert drift_warnings([]) == drift_warnings([release()]) == []
    assert drift_warnings([release(90), release(88)]) == []
    assert "78%" in drift_warnings([release(92), release(91), release(78)])[0]
    slow = [release(refused) for refused in (95, 94, 92, 91, 90)]
    assert "from release to release: 95%, 94%, 92%, 91%, 90%" in drift_warnings(slow)[0]
    assert drift_warnings([*slow[:4], release(10, outcome="rejected")]) == []
    assert drift_warnings([release(), {**release(), "after": None}]) == []


@pytest.mark.parametrize("seed", range(20))
def test_fewer_successes_are_as_likely_as_scipy_says(seed):
    chance = random.Random(seed)
    count, other = chance.randint(1, 400), chance.randint(1, 4000)
    for _ in range(10):
        found, among_others = chance.randint(0, count), chance.randint(0, other)
        table = [[found, count - found], [among_others, other - among_others]]
        expected = fisher_exact(table, alternative="less").pvalue
        assert chance_of_fewer(found, count, among_others, other) == pytest.approx(
            expected, rel=1e-7, abs=1e-14
        )


@pytest.mark.parametrize("different", [2, 5, 1000], ids=["many ties", "some ties", "hardly any"])
@pytest.mark.parametrize("length", [5, 6, 12, 33, 34, 80])
def test_a_fall_is_as_likely_as_scipy_says(length, different):
    chance = random.Random(length)
    for slope in (0.0, 0.0, -0.3, -3.0):
        values = [
            slope * number * different / length + chance.randrange(different)
            for number in range(length)
        ]
        expected = kendalltau(range(length), values, alternative="less").pvalue
        assert chance_of_falling(values) == pytest.approx(expected, rel=1e-7, abs=1e-14)


def test_releases_that_are_all_alike_do_not_fall():
    assert chance_of_falling([1.0] * 6) == 1.0
