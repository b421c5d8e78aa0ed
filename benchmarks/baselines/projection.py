"""What SafeLoRA and SafeMERGE share: the alignment matrix and how much of an update lies along it
(arXiv 2405.16833).

    P = V Vᵀ / ‖V‖_F  with  V = W_aligned − W_base,      ρ = cos(P ΔW, ΔW)

`P` is no projector: its mean eigenvalue is `‖V‖_F / d_out`, so `P ΔW` is all but zero where
alignment changed the weights little.
"""

import torch


def alignment_matrix(alignment: torch.Tensor) -> torch.Tensor:
    """`P`, d_out×d_out, from `V`; zero where the alignment left the module alone."""
    size = alignment.norm()
    return alignment @ alignment.T / size if size > 0 else alignment @ alignment.T


def projected(update: torch.Tensor, alignment: torch.Tensor) -> tuple[torch.Tensor, float]:
    """`P ΔW` and `ρ` (0 where either is zero)."""
    found = alignment_matrix(alignment) @ update
    sizes = found.norm() * update.norm()
    return found, float((found * update).sum() / sizes) if sizes > 0 else 0.0
