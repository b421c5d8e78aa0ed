"""Against values worked out by hand or given in textbooks."""

import math

import numpy as np
import pytest

from safegene_trl.evaluation.statistics import holm, kappa, paired_p, signed_rank_p
from safegene_trl.judges.intervals import (
    Rate,
    mean_interval,
    mean_of_sets_interval,
    paired_interval,
    rate,
)


def test_wilson_interval():
    found = rate([True] * 10 + [False] * 90)
    z, p, n = 1.959964, 0.1, 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert found.interval == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert found.to_dict()["share"] == 0.1
    assert Rate(0, 20).interval[0] == 0.0 and Rate(0, 20).interval[1] > 0.1
    assert rate([]) is None


def test_bootstrap_covers_the_mean():
    values = [0.1, 0.5, 0.9, 0.3, 0.7, 0.6]
    low, high = mean_interval(values)
    assert low < sum(values) / 6 < high and mean_interval(values) == (low, high)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5) and mean_interval([0.2]) == (0.2, 0.2)


@pytest.mark.parametrize("count", [4, 8, 12, 32])
@pytest.mark.parametrize("step", [0.0, 1 / 3])
def test_an_interval_of_values_that_differ_by_rounding_alone_is_a_number(count, step):
    """A third is 1 - 2/3 in some samples and 2/3 - 1/3 in others."""
    values = [1 - 2 / 3, 2 / 3 - 1 / 3] * (count // 2)
    assert len(set(values)) == 2
    low, high = mean_interval(values, step=step)
    assert low <= 1 / 3 + 1e-9 and high >= 1 / 3 - 1e-9
    assert (high - low > 0.01) == (step > 0)


def test_an_interval_whose_bootstrap_is_no_number_has_the_width_it_must_have(monkeypatch):
    class Nothing:
        confidence_interval = (math.nan, math.nan)

    monkeypatch.setattr("safegene_trl.judges.intervals.bootstrap", lambda *a, **k: Nothing)
    low, high = mean_interval([0.1, 0.3, 0.2], step=0.5)
    assert low < 0.2 < high


@pytest.mark.parametrize(("more", "less"), [(0.02, 0.0), (0.06, 0.01), (0.2, 0.1)])
@pytest.mark.parametrize("count", [16, 64])
def test_an_interval_of_paired_shares_covers_the_truth(more, less, count):
    """In nine of ten samples and more; a bootstrap's did so in three of ten where few pairs differ."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(400):
        values = generator.choice([1, -1, 0], size=count, p=[more, less, 1 - more - less])
        low, high = paired_interval(values)
        assert -1 <= low <= values.mean() <= high <= 1
        covered += low <= more - less <= high
    assert covered >= 0.93 * 400
    assert paired_interval([1, -1]) == pytest.approx((-0.979982, 0.979982), abs=1e-5)


def test_interval_of_a_mean_of_sets_draws_every_set_by_itself():
    small, large = [True, False] * 5, [True] * 1000
    low, high = mean_of_sets_interval([small, large])
    assert low == pytest.approx((0.2 + 1) / 2, abs=0.06) and high == pytest.approx(
        (0.8 + 1) / 2, abs=0.06
    )
    assert mean_of_sets_interval([[True], [False]]) == (0.5, 0.5)


def test_mcnemar_counts_the_pairs_that_differ():
    first, second = [True] * 9 + [False] * 41, [False] * 9 + [False] * 40 + [True]
    exact = 2 * sum(math.comb(10, k) for k in (0, 1)) / 2**10  # 9 against 1
    assert paired_p(first, second) == pytest.approx(exact)
    assert paired_p(first, first) == 1.0
    with pytest.raises(ValueError):
        paired_p([True], [True, False])


def test_wilcoxon():
    assert signed_rank_p([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 2**6)
    assert signed_rank_p([0, 0, 0]) == 1.0


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    assert holm({}) == {}


def test_kappa():
    first = [True] * 20 + [True] * 5 + [False] * 10 + [False] * 15
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert kappa(first, second) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert kappa([True, True], [True, True]) is None


def test_a_mean_of_values_that_are_nearly_alike_is_not_sure():
    for values in ([0.0], [0.0] * 20, [0.0] * 19 + [-0.02], [0.0, -0.02], [0.0, 0.0, -0.02]):
        low, high = mean_interval(values, step=0.02)
        assert low < np.mean(values) < high and high > 0
    spread = np.random.default_rng(0).normal(size=50).tolist()
    assert mean_interval(spread, step=0.02) == mean_interval(spread)
    assert mean_interval([0.25] * 3) == (0.25, 0.25)
