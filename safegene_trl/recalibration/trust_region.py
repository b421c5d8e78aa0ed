"""A minimiser for unknowns in a box whose every evaluation is expensive and brings its gradient.

Quasi-Newton with a trust region: the model's Hessian `B` starts from a Gauss–Newton matrix, which
the first evaluation brings too, and takes in every gradient after that by a BFGS update with
Powell's damping (Nocedal and Wright, Numerical Optimization, 2nd ed., 18.3). Each step minimises
`gᵀd + ½ dᵀBd` within the box and the region. `B` is never formed: a diagonal, a row per sample and
two per step hold it, so that thousands of unknowns cost no more memory than their gradients.

L-BFGS-B on the function itself needs about twice as many evaluations here: it knows nothing of the
scale before its first steps.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize


# Added to the Gauss–Newton matrix's diagonal, as a share of itself, and a tenth of that of its
# mean; the more, the fewer of the directions it knows: with fewer samples than unknowns a step
# along the others would cost nothing.
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
        evaluate: Value, gradient (shape `(n,)`) and Gauss–Newton matrix `RᵀR`, as its rows `R`
            (m×n), at a point; of the matrices only the first is used.
        start: First point, shape `(n,)`.
        lower: Lower bound of every unknown.
        upper: Upper bound.
        max_evaluations: Most evaluations, at least 1.
    """
    point = start
    value, gradient, rows = evaluate(point)
    hessian = _Hessian(rows)
    radius = FIRST_RADIUS * (upper - lower)
    for _ in range(max_evaluations - 1):
        step = _step(
            gradient, hessian, np.maximum(lower - point, -radius), np.minimum(upper - point, radius)
        )
        promised = -(gradient @ step + step @ hessian.times(step) / 2)
        if promised < TOLERANCE * abs(value):
            break
        new = np.clip(point + step, lower, upper)
        new_value, new_gradient, _ = evaluate(new)
        kept = (value - new_value) / promised
        hessian.learn(new - point, new_gradient - gradient)
        if kept > 0.75 and np.abs(step).max() > 0.99 * radius:
            radius *= 2
        elif kept < 0.25:
            radius = np.abs(step).max() / 2
        if new_value < value:
            point, value, gradient = new, new_value, new_gradient
    return point


class _Hessian:
    """`B = D + PᵀP − MᵀM`, n×n and positive definite, by a diagonal and rows.

    Args:
        rows: Those of the Gauss–Newton matrix, m×n.
    """

    def __init__(self, rows: np.ndarray):
        diagonal = (rows**2).sum(axis=0)
        damping = DAMPING + BLIND_DAMPING * (1 - np.linalg.matrix_rank(rows) / rows.shape[1])
        self._diagonal = damping * (diagonal + diagonal.mean() / 10) + 1e-12
        self._plus, self._minus = rows, rows[:0]

    @property
    def scale(self) -> np.ndarray:
        """Roots of the diagonal, shape `(n,)`."""
        diagonal = self._diagonal + (self._plus**2).sum(axis=0) - (self._minus**2).sum(axis=0)
        return np.sqrt(np.maximum(diagonal, self._diagonal))

    def times(self, vector: np.ndarray) -> np.ndarray:
        plus, minus = (rows.T @ (rows @ vector) for rows in (self._plus, self._minus))
        return self._diagonal * vector + plus - minus

    def learn(self, step: np.ndarray, change: np.ndarray) -> None:
        """The damped BFGS update with a step and the gradient's change along it."""
        image = self.times(step)
        curvature, known = step @ change, step @ image
        if known <= 0:
            return
        if curvature < 0.2 * known:
            share = 0.8 * known / (known - curvature)
            change = share * change + (1 - share) * image
            curvature = step @ change
        self._plus = np.vstack([self._plus, change / np.sqrt(curvature)])
        self._minus = np.vstack([self._minus, image / np.sqrt(known)])


def _step(
    gradient: np.ndarray, hessian: _Hessian, lower: np.ndarray, upper: np.ndarray
) -> np.ndarray:
    """The minimiser of `gᵀd + ½ dᵀBd` in a box around 0, by L-BFGS-B in units in which the diagonal
    of `B` is 1.
    """
    scale = hessian.scale

    def model(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        step = scaled / scale
        image = hessian.times(step)
        return float(gradient @ step + step @ image / 2), (gradient + image) / scale

    found = minimize(
        model,
        np.zeros_like(gradient),
        jac=True,
        method="L-BFGS-B",
        bounds=np.stack([lower * scale, upper * scale], axis=1),
        options={"maxiter": 2000, "maxfun": 5000, "ftol": 1e-13, "gtol": 1e-9},
    )
    return np.clip(found.x / scale, lower, upper)
