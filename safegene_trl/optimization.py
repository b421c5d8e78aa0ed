"""A minimiser for few unknowns in a box whose every evaluation is expensive and brings its gradient.

Quasi-Newton with a trust region: the model's Hessian `B` starts from a Gauss–Newton matrix, which the first evaluation brings too, and
takes in every gradient after that by a BFGS update with Powell's damping (Nocedal and Wright, Numerical Optimization, 2nd ed., 18.3).
Each step minimises `gᵀd + ½ dᵀBd` within the box and the region, exactly, by `scipy.optimize.lsq_linear`.

L-BFGS-B needs about twice as many evaluations here: it knows nothing of the scale before its first steps.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import lsq_linear


# Added to the Gauss–Newton matrix's diagonal, as a share of itself, and a tenth of that of its mean; the more, the fewer of the
# directions it knows: with fewer samples than unknowns a step along the others would cost nothing.
DAMPING, BLIND_DAMPING = 0.1, 0.45
FIRST_RADIUS = 0.25  # of the trust region, as a share of the box
TOLERANCE = 3e-4  # of the objective: less promised improvement than that ends the search

Evaluation = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]


def minimize_in_box(
    evaluate: Evaluation,
    start: np.ndarray,
    lower: float,
    upper: float,
    max_evaluations: int,
) -> np.ndarray:
    """The best point found.

    Args:
        evaluate: Value, gradient (shape `(n,)`) and Gauss–Newton matrix (n×n, positive semidefinite) at a point; of the
            matrices only the first is used.
        start: First point, shape `(n,)`.
        lower: Lower bound of every unknown.
        upper: Upper bound.
        max_evaluations: Most evaluations, at least 1.
    """
    point = start
    value, gradient, hessian = evaluate(point)
    diagonal = np.diag(hessian)
    damping = DAMPING + BLIND_DAMPING * (1 - np.linalg.matrix_rank(hessian) / len(point))
    hessian = hessian + np.diag(damping * (diagonal + diagonal.mean() / 10) + 1e-12)
    radius = FIRST_RADIUS * (upper - lower)
    for _ in range(max_evaluations - 1):
        step = _step(gradient, hessian, np.maximum(lower - point, -radius), np.minimum(upper - point, radius))
        promised = -(gradient @ step + step @ hessian @ step / 2)
        if promised < TOLERANCE * abs(value):
            break
        new = np.clip(point + step, lower, upper)
        new_value, new_gradient, _ = evaluate(new)
        kept = (value - new_value) / promised
        hessian = _updated(hessian, new - point, new_gradient - gradient)
        if kept > 0.75 and np.abs(step).max() > 0.99 * radius:
            radius *= 2
        elif kept < 0.25:
            radius = np.abs(step).max() / 2
        if new_value < value:
            point, value, gradient = new, new_value, new_gradient
    return point


def _step(gradient: np.ndarray, hessian: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """The minimiser of `gᵀd + ½ dᵀBd` in a box, as the least squares `‖Rd + R⁻ᵀg‖²` with `B = RᵀR`."""
    root = np.linalg.cholesky(hessian).T
    return lsq_linear(root, -np.linalg.solve(root.T, gradient), bounds=(lower - 1e-12, upper + 1e-12)).x


def _updated(hessian: np.ndarray, step: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The damped BFGS update with a step and the gradient's change along it; positive definite always."""
    image = hessian @ step
    curvature, known = step @ change, step @ image
    if known <= 0:
        return hessian
    if curvature < 0.2 * known:
        share = 0.8 * known / (known - curvature)
        change = share * change + (1 - share) * image
        curvature = step @ change
    return hessian - np.outer(image, image) / known + np.outer(change, change) / curvature
