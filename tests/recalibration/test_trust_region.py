"""The minimiser against scipy's, its bounds, its budget, and the first step that the Gauss–Newton
matrix gives.
"""

import tracemalloc

import numpy as np
import pytest
from scipy.optimize import minimize

from safegene_trl.recalibration import trust_region as optimization
from safegene_trl.recalibration.trust_region import minimize_in_box


class Problem:
    """Counts evaluations of a function with gradient and Gauss–Newton matrix."""

    def __init__(self, function):
        self.function, self.points = function, []

    def __call__(self, point):
        self.points.append(point)
        return self.function(point)


def logistic(seed=0, samples=40, count=8):
    """A logistic regression: convex, not quadratic, its Gauss–Newton matrix near its Hessian."""
    random = np.random.default_rng(seed)
    data = random.normal(size=(samples, count)) * np.geomspace(0.3, 3, count)
    labels = np.where(
        random.random(samples) < 1 / (1 + np.exp(-data @ random.normal(size=count))), 1.0, -1.0
    )

    def function(point):
        margins = labels * (data @ point)
        rows = -(labels / (1 + np.exp(margins)))[:, None] * data / samples
        return np.logaddexp(0, -margins).mean(), rows.sum(axis=0), np.sqrt(samples) * rows

    return function


@pytest.mark.parametrize("seed", range(4))
def test_reaches_the_minimum_in_fewer_evaluations_than_lbfgs(seed):
    function = logistic(seed)
    start, bounds = np.full(8, 0.3), [(0.0, 2.0)] * 8
    optimum = minimize(
        lambda p: function(p)[:2], start, jac=True, method="L-BFGS-B", bounds=bounds, tol=1e-12
    ).fun
    near = optimum + 0.01 * (function(start)[0] - optimum)
    problem, peer = Problem(function), Problem(function)
    found = minimize_in_box(problem, start, 0.0, 2.0, 30)
    minimize(lambda p: peer(p)[:2], start, jac=True, method="L-BFGS-B", bounds=bounds)
    assert function(found)[0] == pytest.approx(optimum, rel=2e-3)
    own, other = (
        next(i for i, point in enumerate(each.points) if function(point)[0] <= near)
        for each in (problem, peer)
    )
    assert own <= other and own <= 5
    assert all((point >= 0).all() and (point <= 2).all() for point in problem.points)


def test_a_quadratic_with_its_own_matrix_takes_two_steps():
    target = np.array([0.5, 1.2, -0.1])
    matrix = np.diag([1.0, 10.0, 100.0])
    problem = Problem(
        lambda p: (
            (p - target) @ matrix @ (p - target) / 2 + 1,
            matrix @ (p - target),
            np.sqrt(matrix),
        )
    )
    found = minimize_in_box(problem, np.array([0.3, 0.9, 0.2]), 0.0, 2.0, 12)
    assert found == pytest.approx([0.5, 1.2, 0.0], abs=0.03)
    assert len(problem.points) <= 5


def test_budget_and_best_point():
    problem = Problem(logistic())
    for most in (1, 2, 4):
        problem.points.clear()
        found = minimize_in_box(problem, np.full(8, 0.3), 0.0, 2.0, most)
        assert len(problem.points) == most
        assert problem.function(found)[0] == min(
            problem.function(point)[0] for point in problem.points
        )


def few_samples(seed, samples=6, outputs=4, count=60):
    """A gain against squared residuals, of each sample's four of which its gradient shows one
    direction.
    """
    random = np.random.default_rng(seed)
    jacobians, gain = random.normal(size=(samples, outputs, count)), random.normal(size=count)

    def function(point):
        residuals = jacobians @ point
        losses = (residuals**2).sum(axis=1) / 2
        rows = np.einsum("so,son->sn", residuals, jacobians)
        return (
            losses.mean() + 3 * np.logaddexp(0, -gain @ point),
            rows.mean(axis=0) - 3 * gain / (1 + np.exp(gain @ point)),
            rows / np.sqrt(2 * losses * samples)[:, None],
        )

    return function


def test_where_samples_are_fewer_than_unknowns_the_damping_finds_more(monkeypatch):
    start, reached = np.full(60, 0.3), []
    for damping in (optimization.BLIND_DAMPING, 0.0):
        monkeypatch.setattr(optimization, "BLIND_DAMPING", damping)
        problems = [few_samples(seed) for seed in range(5)]
        reached.append(
            [function(minimize_in_box(function, start, 0.0, 2.0, 8))[0] for function in problems]
        )
    assert np.mean(reached[0]) < 0.9 * np.mean(reached[1])


def test_flat_objective_ends_at_once():
    flat = Problem(lambda point: (1.0, np.zeros(3), np.zeros((3, 3))))
    assert minimize_in_box(flat, np.full(3, 0.3), 0.0, 2.0, 12) == pytest.approx([0.3] * 3)
    assert len(flat.points) == 1


def test_misleading_matrix_is_survived():
    """Too flat and too steep first matrices cost evaluations, not the minimum."""
    function = logistic(1)
    optimum = function(minimize_in_box(function, np.full(8, 0.3), 0.0, 2.0, 60))[0]
    for factor in (0.05, 20.0):

        def odd(point, factor=factor):
            value, gradient, rows = function(point)
            return value, gradient, np.sqrt(factor) * rows

        found = minimize_in_box(odd, np.full(8, 0.3), 0.0, 2.0, 60)
        assert function(found)[0] < function(np.full(8, 0.3))[0]
        assert function(found)[0] == pytest.approx(optimum, rel=0.05)


def test_thousands_of_unknowns_need_no_matrix_of_their_own():
    count = 4000
    function = few_samples(0, count=count)
    start = np.full(count, 0.3)
    tracemalloc.start()
    found = minimize_in_box(function, start, 0.0, 2.0, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        function(found)[0] < 0.2 * function(start)[0] and (found >= 0).all() and (found <= 2).all()
    )
    assert peak < 8 * count**2 / 10  # bytes
