"""SafeMERGE (arXiv 2503.17239): where an update lies away from the alignment's directions, it is
merged with a safety update.

`ΔW ← w ΔW + (1 − w) ΔW_safety` in modules with `ρ < τ`, on the products themselves: PEFT's merge of
two LoRAs by their factors adds cross terms.
"""

from collections.abc import Mapping

import torch

from . import Update
from .projection import projected


def safemerge(
    update: Update,
    safety: Mapping[str, torch.Tensor],
    alignment: Mapping[str, torch.Tensor],
    threshold: float = 0.35,
    weight: float = 0.8,
) -> Update:
    """The merged update.

    Args:
        update: `ΔW` of the fine-tune.
        safety: Update of a LoRA that was trained on refusals alone.
        alignment: `V`, aligned minus unaligned weights.
        threshold: τ.
        weight: w, of the fine-tune.
    """
    return {
        name: weight * matrix + (1 - weight) * safety[name]
        if projected(matrix, alignment[name])[1] < threshold
        else matrix
        for name, matrix in update.items()
    }
