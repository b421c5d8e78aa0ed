"""Truncated decompositions against the exact one."""

import pytest
import torch

from safegene_trl.extraction.svd import truncated_svd


def spectrum(values, shape=(200, 120), seed=0):
    torch.manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, len(values))).Q for size in shape)
    return u * torch.tensor(values) @ v.T


FALLING = spectrum([2.0 ** -(i / 4) for i in range(100)])
FLAT = torch.randn(200, 120, generator=torch.Generator().manual_seed(1))


def best_share(matrix, rank):
    squares = torch.linalg.svdvals(matrix.double()).square()
    return float(squares[:rank].sum() / squares.sum())


@pytest.mark.parametrize(
    ("matrix", "lost"), [(FALLING, 1e-4), (FLAT, 0.02)], ids=["falling", "flat"]
)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_randomised_is_nearly_the_best_and_its_bound_holds(matrix, lost, rank):
    best = best_share(matrix, rank)
    found = truncated_svd(matrix, rank, exact=False, seed=0)
    assert best - lost <= found.kept <= best + 1e-6
    assert best <= found.optimum + 1e-6 and found.optimum <= 1
    captured = 1 - float((matrix - found.delta.dense()).square().sum() / matrix.square().sum())
    assert found.kept == pytest.approx(captured, abs=1e-5)


def test_bound_is_tight_where_the_spectrum_falls():
    found = truncated_svd(FALLING, 32, exact=False, seed=0)
    assert found.optimum - best_share(FALLING, 32) < 2e-3


def test_exact_is_the_best():
    found = truncated_svd(FLAT, 8, exact=True, seed=0)
    assert found.kept == found.optimum == pytest.approx(best_share(FLAT, 8), abs=1e-6)


def test_same_seed_same_factors_and_zero_matrix():
    one, two, other = (
        truncated_svd(FLAT, 4, exact=False, seed=seed).delta.dense() for seed in (3, 3, 4)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    nothing = truncated_svd(torch.zeros(200, 120), 4, exact=False, seed=0)
    assert nothing.kept == nothing.optimum == 1.0 and not nothing.delta.dense().any()
