"""Paired tests and agreement, by scipy and statsmodels. All probabilities are 0–1."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import wilcoxon
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests


def paired_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """McNemar's exact two-sided p-value for two methods over the same prompts."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise ValueError("McNemar's test compares two methods over the same prompts.")
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    return float(mcnemar(table, exact=True).pvalue)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Wilcoxon's two-sided signed-rank p-value of paired differences, e.g. one per seed and task; 1
    where all are 0.
    """
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
    return float(
        cohen_kappa_score([str(label) for label in first], [str(label) for label in second])
    )
