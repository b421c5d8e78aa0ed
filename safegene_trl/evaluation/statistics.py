"""Intervals, paired tests and agreement, by scipy and statsmodels. All shares and probabilities are 0–1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap, wilcoxon
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests


CONFIDENCE = 0.95
RESAMPLES = 2000


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
        return {"share": self.share, "low": low, "high": high, "successes": self.successes, "count": self.count}


def rate(outcomes: Sequence[bool]) -> Rate | None:
    """The rate of True among `outcomes`; None of none."""
    return Rate(sum(map(bool, outcomes)), len(outcomes)) if len(outcomes) else None


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval (BCa) of the mean; the value itself where all are the same."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2 or np.all(sample == sample[0]):
        return float(sample.mean()), float(sample.mean())
    generator = np.random.default_rng(seed)
    found = bootstrap((sample,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, rng=generator)
    low, high = found.confidence_interval
    return float(low), float(high)


def mean_of_sets_interval(sets: Sequence[Sequence[bool]], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval (percentiles) of the mean of several sets' shares, each set drawn again by itself."""
    generator = np.random.default_rng(seed)
    shares = []
    for outcomes in sets:
        values = np.asarray(outcomes, dtype=float)
        shares.append(values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1))
    low, high = np.quantile(np.mean(shares, axis=0), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def paired_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """McNemar's exact two-sided p-value for two methods over the same prompts."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise ValueError("McNemar's test compares two methods over the same prompts.")
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    return float(mcnemar(table, exact=True).pvalue)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Wilcoxon's two-sided signed-rank p-value of paired differences, e.g. one per seed and task; 1 where all are 0."""
    values = np.asarray(differences, dtype=float)
    if not np.any(values):
        return 1.0
    return float(wilcoxon(values).pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for the number of comparisons (Holm)."""
    if not p_values:
        return {}
    _, corrected, _, _ = multipletests(list(p_values.values()), method="holm")
    return dict(zip(p_values, map(float, corrected), strict=True))


def kappa(first: Sequence[object], second: Sequence[object]) -> float | None:
    """Cohen's κ of two judges; None where both give everything one and the same label."""
    if len(set(first) | set(second)) < 2:
        return None
    return float(cohen_kappa_score([str(label) for label in first], [str(label) for label in second]))
