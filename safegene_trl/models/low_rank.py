"""Low-rank weight deltas, and how they get from one process to the others."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..distributed.communicator import Communicator


@dataclass(frozen=True)
class LowRankDelta:
    """`V = B A` of one module: `a` is r×d_in, `b` is d_out×r, both float32 or a 16-bit type."""

    a: torch.Tensor
    b: torch.Tensor

    def dense(self) -> torch.Tensor:
        """`B A` as a d_out×d_in float32 matrix."""
        return self.b.float() @ self.a.float()

    def inner(self, other: "LowRankDelta") -> float:
        """Frobenius inner product with another delta of the module: `Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ)`, no dense
        matrix formed.
        """
        a, b, other_a, other_b = (tensor.double() for tensor in (self.a, self.b, other.a, other.b))
        return float(((b.T @ other_b) * (a @ other_a.T)).sum())


def broadcast_deltas(
    deltas: Mapping[str, LowRankDelta], job: Communicator
) -> dict[str, LowRankDelta]:
    """Collective: rank 0's deltas, in float32, on every rank."""
    own = {name: (list(delta.a.shape), list(delta.b.shape)) for name, delta in deltas.items()}
    shapes = json.loads(job.broadcast_text(json.dumps(own)))
    found = {}
    for name, pair in shapes.items():
        here = (
            [deltas[name].a, deltas[name].b]
            if job.is_main
            else [torch.zeros(shape) for shape in pair]
        )
        found[name] = LowRankDelta(*(job.broadcast(tensor.float()) for tensor in here))
    return found
