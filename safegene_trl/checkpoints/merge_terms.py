"""What a merge adds to a weight: the fine-tune's own LoRAs, then the vector, `W + ΔW_task + λ·B·A`,
in float32; the same for a live model and for one that stays on a disk.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..models.experts import ExpertWeights, of_experts, weights_of
from ..models.low_rank import LowRankDelta
from ..models.names import expert_name
from ..models.parameters import Parameter, TaskFactors, is_transposed


@dataclass(frozen=True)
class Term:
    """One low-rank addition to a weight as it is stored: `left @ right`, rows×r and r×columns,
    float32.

    With DoRA's `magnitude` (rows, float32) every row is scaled to that norm afterwards (arXiv
    2402.09353). `first` is the weight's row that it begins at: an expert's part of a weight that
    holds all of them.
    """

    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor | None = None
    first: int = 0

    def cpu(self) -> "Term":
        """The same on the CPU."""
        magnitude = None if self.magnitude is None else self.magnitude.cpu()
        return Term(self.left.cpu(), self.right.cpu(), magnitude, self.first)


Coefficient = float | torch.Tensor


def add_terms(rows: torch.Tensor, terms: Sequence[Term], first_row: int = 0) -> None:
    """Adds terms, in their order, to float32 rows of a weight in place; `rows[0]` is the weight's
    row `first_row`.
    """
    for term in terms:
        first = max(first_row, term.first)
        last = min(first_row + len(rows), term.first + len(term.left))
        if first >= last:
            continue
        own = rows[first - first_row : last - first_row]
        part = slice(first - term.first, last - term.first)
        own.addmm_(term.left[part].to(rows.device), term.right.to(rows.device))
        if term.magnitude is not None:
            own.mul_((term.magnitude[part].to(rows.device) / own.norm(dim=1))[:, None])


def task_terms(factors: Sequence[TaskFactors], transposed: bool) -> list[Term]:
    """What the fine-tune's own LoRAs add to their module's weight."""
    return [_term(*lora.pair(), transposed, lora.magnitude) for lora in factors]


def expert_task_terms(
    factors: Sequence[TaskFactors], experts: ExpertWeights
) -> list[tuple[int, Term]]:
    """What they add to the matrix of each expert of a parameter, with the expert's number."""
    return [
        (expert, _term(*pair, experts.transposed))
        for lora in factors
        for expert, pair in enumerate(of_experts(lora, experts.count))
    ]


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


def live_terms(
    parameter: Parameter, factors: Sequence[TaskFactors], vector: ScaledVector
) -> tuple[list[Term], list[Term]]:
    """What is added to a live parameter: by the fine-tune's own LoRAs (whole), and by the vector."""
    module = parameter.module
    if parameter.is_weight:
        transposed = is_transposed(module)
        return task_terms(factors, transposed), vector.terms(parameter.module_name, transposed)
    experts = weights_of(parameter)
    if experts is None:
        return [], []
    of_task = expert_task_terms(factors, experts)
    of_vector = [
        (expert, term)
        for expert in range(experts.count)
        for term in vector.terms(expert_name(parameter.canonical, expert), experts.transposed)
    ]
    begun = [
        [replace(term, first=expert * experts.rows) for expert, term in terms]
        for terms in (of_task, of_vector)
    ]
    return begun[0], begun[1]


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
