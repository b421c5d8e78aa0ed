"""Published alternatives to SafeGene, and controls, on the weight update of a fine-tune. One file
each.

An *update* is what a fine-tune added to its aligned model: by module name, a dense float32 matrix
`ΔW` (d_out×d_in). Methods that work after the training turn one update into another; `salora`
trains its own.
"""

from collections.abc import Mapping

import torch


Update = dict[str, torch.Tensor]


def norm(update: Mapping[str, torch.Tensor]) -> float:
    """Frobenius norm over all modules."""
    return float(
        torch.stack([matrix.norm().double() ** 2 for matrix in update.values()]).sum().sqrt()
    )
