"""Shares and means with 95 % intervals, by scipy. All shares are 0–1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap, norm


CONFIDENCE = 0.95
RESAMPLES = 2000
ALIKE = 1e-9  # values that differ by less do so by rounding


@dataclass(frozen=True)
class Rate:
    """A share of successes and Wilson's 95 % interval."""

    successes: int
    count: int

    @property
    def share(self) -> float:
        return self.successes / self.count

    @property
    def interval(self) -> tuple[float, float]:
        found = binomtest(self.successes, self.count).proportion_ci(CONFIDENCE, method="wilson")
        return float(found.low), float(found.high)

    def to_dict(self) -> dict[str, float | int]:
        low, high = self.interval
        return {
            "share": self.share,
            "low": low,
            "high": high,
            "successes": self.successes,
            "count": self.count,
        }


def rate(outcomes: Sequence[bool]) -> Rate | None:
    """The rate of True among `outcomes`; None of none."""
    return Rate(sum(map(bool, outcomes)), len(outcomes)) if len(outcomes) else None


def fewest(share: float) -> int:
    """How many outcomes there must be at least, all of them successes, for Wilson's interval to begin at
    a share (0–1, below 1): `n / (n + z²)` is its lower end.
    """
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    return max(1, math.ceil(share * z**2 / (1 - share)))


def mean_interval(values: Sequence[float], seed: int = 0, step: float = 0.0) -> tuple[float, float]:
    """Bootstrap 95 % interval (BCa) of the mean.

    A bootstrap has little or no width where nearly all values, or all, are alike. So the interval is
    at least as wide as `paired_interval` makes it where no pair differs, times `step`.

    Args:
        values: At least one.
        seed: For drawing the resamples.
        step: The least by which a value can differ; 0 adds no width.
    """
    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(2) * step / (len(sample) + 2)
    least, most = mean - half, mean + half
    if len(sample) < 2 or float(np.ptp(sample)) < ALIKE:
        return least, most
    generator = np.random.default_rng(seed)
    found = bootstrap(
        (sample,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, rng=generator
    )
    low, high = (float(end) for end in found.confidence_interval)
    low, high = (end if math.isfinite(end) else mean for end in (low, high))
    return min(low, least), max(high, most)


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of paired differences of two shares, each -1, 0 or 1, as wide as it
    has to be where there are few pairs, or few that differ (the adjusted Wald
    interval of Bonett and Price, 2012). A bootstrap has no width where all pairs are alike.
    """
    count = len(differences) + 2
    more = (sum(value > 0 for value in differences) + 1) / count
    less = (sum(value < 0 for value in differences) + 1) / count
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    half = z * math.sqrt((more + less - (more - less) ** 2) / count)
    return max(more - less - half, -1.0), min(more - less + half, 1.0)


def mean_of_sets_interval(sets: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval (percentiles) of the mean of several sets' means, each set drawn
    again by itself.
    """
    generator = np.random.default_rng(seed)
    means = []
    for outcomes in sets:
        values = np.asarray(outcomes, dtype=float)
        means.append(
            values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
        )
    low, high = np.quantile(np.mean(means, axis=0), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
