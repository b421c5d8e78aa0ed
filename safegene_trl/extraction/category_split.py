"""A delta as the sum of what it does to the prompts of each category and what it does to all, exactly.

With `V = B A` of one module, `x` its input at a prompt's last token, `m_c` the mean of x over the
prompts of category c, and `m̄` the mean of the C category means:

    V_c      = V (m_c − m̄) g_cᵀ        of rank one
    V_shared = V − Σ_c V_c

`g_c` reads whether a prompt is of category c: among the C categories and the benign prompts, each of
the same weight, `g_cᵀ x` is the ridge estimate of 1 for a prompt of c and of 0 for any other,

    g_c = (Σ_j M_j + ε I)⁻¹ m_c,   M_j the second moment of x over class j,

with that ε, of a few, whose leave-one-out error is least. It is computed from the products of the
prompts' states with each other, so that no matrix of d_in×d_in is formed. As far as a linear reading
tells the classes apart, `V_c m_c = V (m_c − m̄)`, `V_c` is zero on other categories and on benign
prompts, and `V_shared` does `V m̄` to each category: what the categories share is taken out once. The
sum is V whatever the readings are worth. Nothing depends on the order of the categories.

One direction for each harm category is the multi-vector form of arXiv 2606.05290. There are no
projectors here that are orthogonal to each other, as `Σ_c (m_c − m̄) = 0`: C such directions are never
independent, and of two categories both would have the same one. Nor does g_c keep to what A reads,
whose r directions tell hardly more than r categories apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot, pad

from ..models.low_rank import LowRankDelta


_RIDGES = tuple(10.0**power for power in range(-6, 2))  # shares of the states' mean square


@dataclass(frozen=True)
class Reading:
    """How the categories are read of the inputs of a module.

    Attributes:
        vectors: The g_c: d_in×C, float64.
        own: The `m_c − m̄`: d_in×C, float64.
        left_out: What each reads of every prompt, with that prompt left out: n×C, float64.
    """

    vectors: torch.Tensor
    own: torch.Tensor
    left_out: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor, classes: torch.Tensor, categories: int) -> "Reading":
        """That of states.

        Args:
            states: The inputs x of every prompt: n×d_in.
            classes: Of each the number of its category, and `categories` of a benign one: n, int64.
            categories: C.
        """
        states, targets = states.double(), one_hot(classes, categories + 1).double()
        weights = targets @ (1 / targets.sum(dim=0))
        wanted = targets[:, :categories]
        means = states.T @ (wanted * weights[:, None])
        dual, left_out = _least_error(states, wanted, weights)
        own = means - means.mean(dim=1, keepdim=True)
        return cls(states.T @ dual, own, left_out)


@dataclass(frozen=True)
class Split:
    """A module's delta by category.

    Attributes:
        delta: The stacked factors, float32: first those of what is shared, of the rank that the delta
            had, then a rank-one part for each category.
        reading: What it was split by.
        sizes: `‖V (m_c − m̄)‖` of each category: C, float64.
    """

    delta: LowRankDelta
    reading: Reading
    sizes: torch.Tensor


def split(delta: LowRankDelta, reading: Reading) -> Split:
    """A delta by category."""
    a, b = delta.a.double(), delta.b.double()
    kept = a @ reading.own  # r×C
    written = b @ kept
    scale = (_norms(reading.vectors) / _norms(written)).sqrt()
    stacked = LowRankDelta(
        torch.cat([a - kept @ reading.vectors.T, (reading.vectors / scale).T]).float(),
        torch.cat([b, written * scale], dim=1).float(),
    )
    return Split(stacked, reading, written.norm(dim=0))


def whole(delta: LowRankDelta, categories: int) -> LowRankDelta:
    """A delta that stays in what is shared: nothing of it is any category's."""
    return LowRankDelta(
        pad(delta.a.float(), (0, 0, 0, categories)), pad(delta.b.float(), (0, categories))
    )


def _least_error(
    states: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The readings as sums of the states (n×C), by the ridge of least leave-one-out error, and what
    they read of each prompt that is left out.

    With `X` the states and `y` what is wanted of them, both times the roots of the weights, and
    `K = X Xᵀ`, `g = Xᵀ (K + εI)⁻¹ y`; a residual `r` that a prompt takes part in with influence `h`
    is `r / (1 − h)` without it.
    """
    roots = weights.sqrt()[:, None]
    scaled = states * roots
    values, basis = torch.linalg.eigh(scaled @ scaled.T)
    values, turned = values.clamp(min=0), basis.T @ (wanted * roots)
    unit = float(values.mean())
    best: tuple[float, torch.Tensor, torch.Tensor] | None = None
    for ridge in _RIDGES:
        shrunk = 1 / (values + ridge * max(unit, 1e-30))
        influence = (basis.square() @ (values * shrunk))[:, None]
        residual = wanted * roots - basis @ ((values * shrunk)[:, None] * turned)
        residual = residual / (1 - influence).clamp(min=1e-9)
        error = float(residual.square().sum())
        if best is None or error < best[0]:
            best = error, basis @ (shrunk[:, None] * turned) * roots, wanted - residual / roots
    assert best is not None
    return best[1], best[2]


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
        read = torch.stack([each.reading.left_out[:, category] for each in splits.values()])
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
