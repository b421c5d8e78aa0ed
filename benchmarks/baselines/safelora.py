"""SafeLoRA (arXiv 2405.16833): updates that lie away from the alignment's directions are projected
onto them.

`ΔW ← P ΔW` in modules with `ρ ≤ τ`, or among the `least` lowest ρ.
"""

from collections.abc import Mapping

import torch

from . import Update
from .projection import projected


def safelora(
    update: Update, alignment: Mapping[str, torch.Tensor], threshold: float = 0.5, least: int = 10
) -> Update:
    """The projected update.

    Args:
        update: `ΔW` of the fine-tune.
        alignment: `V`, aligned minus unaligned weights, of the same modules.
        threshold: τ.
        least: Modules projected whatever their ρ.
    """
    found = {name: projected(matrix, alignment[name]) for name, matrix in update.items()}
    lowest = sorted(found, key=lambda name: found[name][1])[:least]
    return {
        name: found[name][0] if found[name][1] <= threshold or name in lowest else matrix
        for name, matrix in update.items()
    }
