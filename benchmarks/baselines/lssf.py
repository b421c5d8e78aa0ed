"""LSSF (arXiv 2602.00038, “Low-Rank Safety Subspace Fusion”, ACL 2025): the safety vector is added
as far as it lies in a few directions of the module's outputs, those that refusals use.

    Z = W X̂ = U Σ …                       outputs of the aligned model's module on refusals
    p_i = σ_i² / Σ_j σ_j²,   H_ρ = −Σ_{i≤ρ} p_i log p_i          safety singular value entropy
    r = min {ρ : H_ρ / H_n ≥ η},   P = U_r U_rᵀ
    θ = θ_t + α P δ

with `δ` the safety vector, aligned minus unsafe weights. There is no code by the authors, and the
formulas are known here from descriptions of the paper. They leave open how the inputs X are
standardised, and give each direction a weight between 1 and a factor by its σ.

Ours: X as it is, all directions with the same weight, η = 0.85 from the range that is told (0.8 to
0.9), α = 1. The unsafe model is one that was weakened by harmless data, as in every row here, where
the paper's was trained on harmful answers; X are the vector's harmful prompts with their refusals.
"""

from collections.abc import Mapping

import torch

from . import Update
from .moments import output_directions


def lssf(
    update: Update,
    vector: Mapping[str, torch.Tensor],
    aligned: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    kept: float = 0.85,
    weight: float = 1.0,
) -> tuple[Update, dict[str, int]]:
    """The update with the vector's part in the safety subspace added.

    Args:
        update: `ΔW` of the fine-tune.
        vector: `δ`, d_out×d_in; modules without an entry keep their update.
        aligned: Weights of the aligned model.
        moments: `X Xᵀ / n` (d_in×d_in) of every module's inputs on the responses of safety data.
        kept: η.
        weight: α.

    Returns:
        The update, and the rank r of every module that got something.
    """
    found, ranks = dict(update), {}
    for name, delta in vector.items():
        if name not in update:
            continue
        directions, values = output_directions(aligned[name], moments[name])
        ranks[name] = safety_rank(values, kept)
        basis = directions[:, : ranks[name]]
        found[name] = update[name] + weight * (basis @ (basis.T @ delta.to(basis.device)))
    return found, ranks


def safety_rank(values: torch.Tensor, kept: float) -> int:
    """r: how many of the singular values (descending) hold the share `kept` of their entropy."""
    shares = (values.double() ** 2) / (values.double() ** 2).sum()
    entropy = torch.special.entr(shares).cumsum(0)
    if entropy[-1] <= 0:  # there is one direction
        return 1
    return int((entropy < kept * entropy[-1]).sum()) + 1
