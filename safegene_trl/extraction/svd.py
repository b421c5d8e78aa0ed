"""Truncated singular value decompositions: exact, randomised with an error bound, and of a product
of factors.

Randomised: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1. With `Q` an
orthonormal basis of the range of `(D Dᵀ)^q D Ω` and `R = D − Q Qᵀ D`, no matrix of rank r captures
more of `‖D‖²` than the r largest singular values of `Qᵀ D` and `‖R‖²` together (Ky Fan's inequality
for `Dᵀ D = (QᵀD)ᵀ(QᵀD) + RᵀR`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..models.low_rank import LowRankDelta


OVERSAMPLING = 8
POWER_ITERATIONS = 2


@dataclass(frozen=True)
class Truncation:
    """A matrix at rank r.

    Attributes:
        delta: The factors, float32; singular values shared evenly between them.
        kept: Share (0–1) of the matrix's squared Frobenius norm that they capture.
        optimum: Upper bound of the share that any factors of that rank capture.
        squares: The whole matrix's squared Frobenius norm.
    """

    delta: LowRankDelta
    kept: float
    optimum: float
    squares: float


def truncated_svd(matrix: torch.Tensor, rank: int, exact: bool, seed: int) -> Truncation:
    """The best (or, randomised, nearly the best) approximation of a float32 matrix at a rank."""
    total = _squares(matrix)
    size = rank + OVERSAMPLING
    if exact or size >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        kept = _squares(s[:rank]) / total if total else 1.0
        delta = _padded(balanced(u[:, :rank], s[:rank], vh[:rank]), rank)
        return Truncation(delta, kept, kept, total)
    generator = torch.Generator().manual_seed(seed)
    basis = _orthonormal(matrix @ torch.randn(matrix.shape[1], size, generator=generator))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    small = basis.T @ matrix
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    delta = balanced(basis @ u[:, :rank], s[:rank], vh[:rank])
    kept = _squares(s[:rank]) / total if total else 1.0
    missed = 1 - _squares(s) / total if total else 0.0
    return Truncation(delta, kept, min(1.0, kept + max(0.0, missed)), total)


def factors_at_rank(a: torch.Tensor, b: torch.Tensor, rank: int) -> Truncation:
    """`B A` at a given rank: padded with zeros up to it, or cut down to it by an exact SVD of the
    small core.
    """
    if rank >= a.shape[0]:
        whole = LowRankDelta(a, b)
        return Truncation(_padded(whole, rank), 1.0, 1.0, max(0.0, whole.inner(whole)))
    u, s, vh = svd_of_product(a, b)
    total = _squares(s)
    kept = _squares(s[:rank]) / total if total else 1.0
    delta = _padded(balanced(u[:, :rank], s[:rank], vh[:rank]), rank)
    return Truncation(delta, kept, kept, total)


def _padded(delta: LowRankDelta, rank: int) -> LowRankDelta:
    """With zeros up to a rank: a matrix of one row, like a gate, has no more than one part."""
    missing = rank - delta.a.shape[0]
    return LowRankDelta(F.pad(delta.a, (0, 0, 0, missing)), F.pad(delta.b, (0, missing)))


def svd_of_product(
    a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`U`, `S` and `Vᴴ` of `B A` without forming it, by the SVD of a core of the factors' rank."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> LowRankDelta:
    """`U diag(s) Vᴴ` as `B A` with `√s` in each factor."""
    root = s.sqrt()
    return LowRankDelta((root[:, None] * vh).contiguous(), (u * root).contiguous())


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrix).Q


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
