"""What baselines with a free setting choose it by: the losses of the shots that are held out.

    CE(refusals) + CE(benign answers) + CE(task answers),

each the mean over the response tokens of the held-out samples of its kind. It weighs the three as
one does who knows nothing else, and it reads what recalibration is accepted by.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from safegene_trl.data.calibration import CalibrationSet
from safegene_trl.models.inputs import batches
from safegene_trl.models.losses import cross_entropy


Setting = TypeVar("Setting")


@torch.no_grad()
def held_out_loss(model: nn.Module, shots: CalibrationSet, pad_id: int) -> float:
    """The sum, in nats per token; shots without benign samples have no term for them.

    Args:
        model: Model, on any device.
        shots: Of which the held-out samples are read.
        pad_id: Token to pad with.
    """
    device = next(model.parameters()).device
    found = 0.0
    for split in (shots.harmful, shots.benign, shots.task):
        if split is None:
            continue
        nats, tokens = 0.0, 0
        for batch in batches(split.held_out, 8, pad_id, device):
            nats += float(cross_entropy(model, batch).sum())
            tokens += int(batch.target_mask.sum())
        found += nats / tokens
    return found


def lowest(losses: Mapping[Setting, float]) -> Setting:
    """The setting with the lowest loss, of equal ones the first; one that diverged only where all
    have.
    """
    return min(losses, key=lambda setting: (not losses[setting] < float("inf"), losses[setting]))
