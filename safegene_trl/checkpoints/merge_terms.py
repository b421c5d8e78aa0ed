"""What a merge adds to a weight: the fine-tune's own LoRAs, then the vector, `W + ΔW_task + λ·B·A`,
in float32; the same for a live model and for one that stays on a disk.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..models.low_rank import LowRankDelta
from ..models.parameters import TaskFactors


@dataclass(frozen=True)
class Term:
    """One low-rank addition to a weight as it is stored: `left @ right`, rows×r and r×columns,
    float32.

    With DoRA's `magnitude` (rows, float32) every row is scaled to that norm afterwards (arXiv
    2402.09353).
    """

    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor | None = None

    def cpu(self) -> "Term":
        """The same on the CPU."""
        magnitude = None if self.magnitude is None else self.magnitude.cpu()
        return Term(self.left.cpu(), self.right.cpu(), magnitude)


Coefficient = float | torch.Tensor


def add_terms(rows: torch.Tensor, terms: Sequence[Term], first_row: int = 0) -> None:
    """Adds terms, in their order, to float32 rows of a weight in place; `rows[0]` is the weight's
    row `first_row`.
    """
    part = slice(first_row, first_row + len(rows))
    for term in terms:
        rows.addmm_(term.left[part].to(rows.device), term.right.to(rows.device))
        if term.magnitude is not None:
            rows.mul_((term.magnitude[part].to(rows.device) / rows.norm(dim=1))[:, None])


def task_terms(factors: Sequence[TaskFactors], transposed: bool) -> list[Term]:
    """What the fine-tune's own LoRAs add to their module's weight."""
    return [_term(*lora.pair(), transposed, lora.magnitude) for lora in factors]


def _term(
    a: torch.Tensor, b: torch.Tensor, transposed: bool, magnitude: torch.Tensor | None = None
) -> Term:
    return Term(a.T.contiguous(), b.T.contiguous()) if transposed else Term(b, a, magnitude)


@dataclass(frozen=True)
class ScaledVector:
    """A safety vector with the coefficients by which a merge adds it: `λ·B·A` for each module.

    Attributes:
        deltas: Its deltas by canonical module name.
        coefficients: By module name: one λ, or one of each of the delta's r rank-one parts.
    """

    deltas: Mapping[str, LowRankDelta]
    coefficients: Mapping[str, Coefficient]

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and λ·B of a module that the vector is on, float32."""
        delta = self.deltas[module]
        return delta.a.float(), self.coefficients[module] * delta.b.float()

    def terms(self, module: str, transposed: bool) -> list[Term]:
        """What is added to a module's weight: nothing where the vector is not on it, or λ is 0."""
        if module not in self.deltas or not torch.as_tensor(self.coefficients[module]).any():
            return []
        return [_term(*self.factors(module), transposed)]


NO_VECTOR = ScaledVector({}, {})  # of a fine-tune that is written as it is


@contextmanager
def full_float32() -> Iterator[None]:
    """While open, float32 products are float32: trainers let NVIDIA GPUs round their factors to 10
    bits (TF32).
    """
    backend = torch.backends.cuda.matmul
    name, exact = (
        ("fp32_precision", "ieee") if hasattr(backend, "fp32_precision") else ("allow_tf32", False)
    )  # torch < 2.9
    before = getattr(backend, name)
    setattr(backend, name, exact)
    try:
        yield
    finally:
        setattr(backend, name, before)
