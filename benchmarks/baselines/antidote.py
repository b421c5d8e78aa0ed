"""Antidote (arXiv 2408.09600): after the fine-tune, the weights that matter most to harmful data
are set to zero.

Wanda's score (arXiv 2306.11695) of a weight is `|W_ij| · ‖X_j‖₂`, with `X_j` the module's j-th
input over harmful data; the top `share` of every module's scores is pruned. The paper scores on
harmful questions with their answers; no harmful answer is used here, so the score is taken on the
questions alone.
"""

from collections.abc import Mapping

import torch

from . import Update


def antidote(
    update: Update,
    aligned: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    share: float = 0.05,
) -> Update:
    """The update after which the pruned weights of `aligned + update` are zero.

    Args:
        update: `ΔW` of the fine-tune.
        aligned: Weights before it.
        moments: `X Xᵀ / n` (d_in×d_in) of every module's inputs on harmful prompts.
        share: Share (0–1) of the weights pruned.
    """
    found = {}
    for name, matrix in update.items():
        before = aligned[name].float()
        weight = before + matrix
        scores = weight.abs() * moments[name].diagonal().sqrt()
        count = round(share * scores.numel())
        pruned = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        pruned[scores.flatten().topk(count).indices] = True
        found[name] = torch.where(pruned.view_as(weight), -before, matrix)
    return found
