"""RESTA (arXiv 2402.11746): the safety vector is added with one weight, after DARE (arXiv
2311.03099) if wanted.

    θ = θ_t + γ (θ_aligned − θ_unsafe)

DARE first drops each entry of the fine-tune's update with probability p and divides the others by 1
− p.
"""

from collections.abc import Mapping

import torch

from . import Update


def resta(
    update: Update,
    vector: Mapping[str, torch.Tensor],
    weight: float = 0.5,
    drop: float = 0.0,
    seed: int = 0,
) -> Update:
    """The update with the vector added.

    Args:
        update: `ΔW` of the fine-tune.
        vector: Aligned minus unsafe weights; modules without an entry keep their update.
        weight: γ.
        drop: p of DARE, below 1; 0 leaves the update whole.
        seed: For dropping.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, matrix in update.items():
        kept = (
            (torch.rand(matrix.shape, generator=generator) >= drop).to(matrix.device)
            if drop
            else torch.ones_like(matrix)
        )
        found[name] = matrix * kept / (1 - drop)
        if name in vector:
            found[name] = found[name] + weight * vector[name].to(matrix.device)
    return found
