"""What tells a module of the target that a prompt is harmful: a regression on the module's own input.

For module `m` with inputs `x_i` of prompts and anchors, `y_i = 1` for harmful prompts and 0 for benign
ones and anchors, and weights `w_i` by which the two kinds count alike,

    u_m = argmin_u Σ_i w_i (y_i − uᵀx_i)² + κ ‖u‖²

without an intercept, as a weight delta has none: `uᵀx` is about 1 on harmful prompts and about 0 on
others. It is solved in the space of the texts, `u = Xᵀ(XXᵀ + κI)⁻¹y` with `√w` in `X` and `y`, whose
size does not grow with the module. There the predictions that leave a text out come for nothing,

    ŷ_i = y_i − α_i / [(XXᵀ + κI)⁻¹]_ii,   α = (XXᵀ + κI)⁻¹ y,

and by them `κ` is chosen, the separation of harmful from benign prompts told (`auc`), and `u` brought to
a mean of 1 on the harmful prompts that it has not seen.

Only prompts are read, never answers, and nothing that the target itself says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # in the mean square of the texts' inputs
ANCHORS = 256  # of them at most, so that what is solved does not grow with their number
POOR = 0.75  # AUC below which a detector is named
_LEAST = 0.1  # mean prediction on harmful prompts below which `u` is not brought to 1


@dataclass(frozen=True)
class Detector:
    """`u` of one module.

    Attributes:
        direction: `u`, float64, `(d_in,)`.
        auc: Chance (0–1) that a harmful prompt left out scores above a benign one left out.
        harmful: Mean score of harmful prompts left out, before `u` was brought to 1.
        benign: The same of benign prompts.
        penalty: The `κ` that was chosen, in the mean square of the inputs.
    """

    direction: np.ndarray
    auc: float
    harmful: float
    benign: float
    penalty: float


def detector(harmful: np.ndarray, benign: np.ndarray, others: Sequence[np.ndarray]) -> Detector:
    """The detector of one module.

    Args:
        harmful: Inputs where the answer to harmful prompts begins, prompts×d_in.
        benign: The same of benign prompts.
        others: Further inputs on which it is to be quiet: those of anchors, and what benign texts
            are in the mean.
    """
    rows = np.concatenate([harmful, benign, *others]).astype(np.float64)
    first, second = len(harmful), len(harmful) + len(benign)
    answers = np.zeros(len(rows))
    answers[:first] = 1.0
    weights = np.where(answers > 0, 0.5 / first, 0.5 / (len(rows) - first))
    roots = np.sqrt(weights)
    scaled = rows * roots[:, None]
    gram = scaled @ scaled.T
    best = None
    for penalty in PENALTIES:
        inverse = np.linalg.inv(gram + (penalty * np.trace(gram) + 1e-30) * np.eye(len(gram)))
        alpha = inverse @ (roots * answers)
        left_out = answers - alpha / np.diag(inverse) / roots
        error = float(weights @ (answers - left_out) ** 2)
        if best is None or error < best[0]:
            best = error, penalty, alpha, left_out
    assert best is not None
    _, penalty, alpha, scores = best
    own, other = scores[:first], scores[first:second]
    scale = max(float(own.mean()), _LEAST)
    return Detector(
        scaled.T @ alpha / scale, auc(own, other), float(own.mean()), float(other.mean()), penalty
    )


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """Chance (0–1) that one of the first lies above one of the second, ties counted half."""
    sides = np.sort(below)
    lower = np.searchsorted(sides, above, side="left")
    upper = np.searchsorted(sides, above, side="right")
    return float((lower + upper).mean() / (2 * len(below)))
