"""A delta as the sum of what it does to the prompts of each category and what it does to all, exactly.

With `V = B A` of one module, `W` an orthonormal basis of the inputs that V reads (d_in×ρ, `V = V W
Wᵀ`), `z = Wᵀ x` of an input `x`, `m_c` the mean of `z` over the prompts of category c, `m̄` the mean
of the C category means, and `b` that over benign prompts:

    V_c      = V W (m_c − m̄) g_cᵀ Wᵀ            of rank one
    V_shared = V − Σ_c V_c

`g_c` reads whether a prompt is of category c: among the C categories and the benign prompts, each of
the same weight, `g_cᵀ z` is the least-squares estimate of 1 for a prompt of c and of 0 for any other,

    g_c = (Σ_j M_j + ε I)⁻¹ m_c,   M_j the second moment of z over class j,

with that ε, of a few, whose leave-one-out error is least. Where a linear reading can tell the classes
apart, `V_c m_c = V (m_c − m̄)`, `V_c m_j = 0` for any other category, `V_c b = 0`, and `V_shared` does
`V m̄` to each category: what the categories share is taken out once. The sum is V whatever the
readings are worth. Nothing depends on the order of the categories.

One direction per harm category is the multi-vector form of arXiv 2606.05290. There are no projectors
here that are orthogonal to each other, as `Σ_c (m_c − m̄) = 0`: C such directions are never
independent, and two categories would have the same one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..models.low_rank import LowRankDelta
from .svd import balanced, svd_of_product


_RIDGES = tuple(10.0**power for power in range(-6, 1))  # shares of the moments' mean eigenvalue
_NEGLIGIBLE = 1e-5  # singular values, as shares of the largest: float16 has no more digits


@dataclass(frozen=True)
class Basis:
    """The parts of a delta: `V = left · inputsᵀ`.

    Attributes:
        left: d_out×ρ, float64: what it writes, singular values in it.
        inputs: d_in×ρ, float64, orthonormal: what it reads.
    """

    left: torch.Tensor
    inputs: torch.Tensor

    @classmethod
    def of(cls, delta: LowRankDelta) -> "Basis":
        """That of a delta; ρ is the rank that it has, not that of its factors."""
        u, s, vh = svd_of_product(delta.a.double(), delta.b.double())
        kept = s > _NEGLIGIBLE * s.max()
        return cls((u * s)[:, kept], vh[kept].T.contiguous())

    @property
    def rank(self) -> int:
        """ρ."""
        return self.inputs.shape[1]


@dataclass(frozen=True)
class Split:
    """A module's delta by category.

    Attributes:
        delta: The stacked factors, float32: first those of what is shared, of the rank that the delta
            had, then a rank-one part for each category.
        readings: What each category reads of every prompt, the prompt itself left out: n×C, float64.
        sizes: `‖V_c W m_c‖` of each category: C, float64.
    """

    delta: LowRankDelta
    readings: torch.Tensor
    sizes: torch.Tensor


def split(
    delta: LowRankDelta, basis: Basis, states: torch.Tensor, classes: torch.Tensor, categories: int
) -> Split:
    """A delta by category.

    Args:
        delta: The whole one.
        basis: Its parts, of a rank above the number of categories.
        states: `z` of every prompt: n×ρ, float64.
        classes: Of every prompt the number of its category, and `categories` of a benign one: n, int64.
        categories: C.
    """
    targets = torch.nn.functional.one_hot(classes, categories + 1).double()
    weights = targets @ (1 / targets.sum(dim=0))
    means = states.T @ (targets * weights[:, None])  # ρ×(C+1)
    moments = states.T @ (states * weights[:, None])
    wanted = targets[:, :categories]
    inverse, readings = _least_error(states, moments, means[:, :categories], wanted, weights)
    vectors = inverse @ means[:, :categories]  # ρ×C, the g_c
    own = means[:, :categories] - means[:, :categories].mean(dim=1, keepdim=True)
    written = basis.left @ own
    left_over = torch.eye(basis.rank, dtype=torch.float64) - own @ vectors.T
    shared = _at_rank(basis.left @ left_over, basis.inputs, delta.a.shape[0])
    read = basis.inputs @ vectors
    scale = (_norms(read) / _norms(written)).sqrt()
    stacked = LowRankDelta(
        torch.cat([shared.a, (read / scale).T]).float().contiguous(),
        torch.cat([shared.b, written * scale], dim=1).float().contiguous(),
    )
    return Split(stacked, readings, written.norm(dim=0))


def whole(delta: LowRankDelta, categories: int) -> LowRankDelta:
    """A delta that stays in what is shared: nothing of it is any category's."""
    return LowRankDelta(
        torch.nn.functional.pad(delta.a.float(), (0, 0, 0, categories)),
        torch.nn.functional.pad(delta.b.float(), (0, categories)),
    )


def _least_error(
    states: torch.Tensor,
    moments: torch.Tensor,
    means: torch.Tensor,
    wanted: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(Σ_j M_j + ε I)⁻¹` with the ε of least leave-one-out error, and the readings by which that is
    told.
    """
    unit = torch.eye(len(moments), dtype=torch.float64) * moments.diagonal().mean()
    found: list[tuple[float, torch.Tensor, torch.Tensor]] = []
    for ridge in _RIDGES:
        inverse = torch.linalg.inv(moments + ridge * unit)
        influence = weights * ((states @ inverse) * states).sum(dim=1)
        read = states @ (inverse @ means)
        left_out = (read - influence[:, None] * wanted) / (1 - influence).clamp(min=1e-9)[:, None]
        error = float((weights[:, None] * (left_out - wanted).square()).sum())
        found.append((error, inverse, left_out))
    _, inverse, left_out = min(found, key=lambda each: each[0])
    return inverse, left_out


def _at_rank(left: torch.Tensor, inputs: torch.Tensor, rank: int) -> LowRankDelta:
    """`left · inputsᵀ` as factors of a rank that it does not exceed, singular values shared evenly."""
    found = balanced(*svd_of_product(inputs.T, left))
    missing = rank - found.a.shape[0]
    return LowRankDelta(
        torch.nn.functional.pad(found.a, (0, 0, 0, missing)),
        torch.nn.functional.pad(found.b, (0, missing)),
    )


def _norms(columns: torch.Tensor) -> torch.Tensor:
    """Of every column; 1 for a column of zeros, whose factors stay as they are."""
    norms = columns.norm(dim=0)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def told_apart(
    splits: Mapping[str, Split], classes: torch.Tensor, categories: int
) -> list[dict[str, float]]:
    """Of every category what its component reads of prompts that its reading was not fitted on, over
    the modules, each by what it does there: `reads_own` is the mean over its prompts, `reads_others`
    and `reads_benign` are the roots of the mean squares over those of other categories, and over
    benign ones. 1, 0 and 0 is best.
    """
    found = []
    for category in range(categories):
        sizes = torch.stack([each.sizes[category] ** 2 for each in splits.values()])
        shares = sizes / sizes.sum() if sizes.sum() > 0 else torch.ones_like(sizes) / len(sizes)
        read = torch.stack([each.readings[:, category] for each in splits.values()])
        other = (classes != category) & (classes != categories)

        def over(which: torch.Tensor, values: torch.Tensor, shares: torch.Tensor = shares) -> float:
            return float((shares * values[:, which].mean(dim=1)).sum())

        found.append(
            {
                "reads_own": round(over(classes == category, read), 4),
                "reads_others": round(over(other, read.square()) ** 0.5, 4),
                "reads_benign": round(over(classes == categories, read.square()) ** 0.5, 4),
            }
        )
    return found
