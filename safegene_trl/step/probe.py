"""A few held-out refusals, by whose logits one model is told from another."""

from collections.abc import Sequence

import torch
from torch import nn

from ..distributed.layouts import Sharding
from ..errors import OutputError
from ..models.inputs import Sample, batches
from ..models.losses import response_logits


PROBE_SAMPLES = 4  # of the held-out refusals: enough to tell one model from another
MERGED_TOLERANCE = 1e-3  # of the largest logit: other kernels, the same weights
ADAPTER_TOLERANCE = 0.05  # the same of an adapter, whose factors another data type computes with
RELOADED_TOLERANCE = (
    0.05  # autocast, fused kernels: what the live model has and a fresh one has not
)
DAMAGED = (
    "The written checkpoint is not the model that was measured (its logits differ by {distance}): do not use it; check the "
    "disk, then run it again."
)
MORE_THAN_WEIGHTS = (
    "A model loaded from the checkpoint is not the fine-tune (its logits differ by {distance}): a hook, a module of your own "
    "or a setting changed after loading acts on the fine-tune; remove it, or set it in the config the model is made from."
)


class Probe:
    """Held-out refusals, and their logits on the model that was measured.

    Args:
        samples: The refusals: of more than `PROBE_SAMPLES` the first.
        padding: The id of the padding token.
        sharding: How the model is spread over ranks.
    """

    def __init__(self, samples: Sequence[Sample], padding: int, sharding: Sharding):
        self._samples, self._padding = samples[:PROBE_SAMPLES], padding
        self._sharding = sharding
        self.measured = torch.empty(0)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> torch.Tensor:
        """Logits (tokens×vocabulary, float32, CPU). Collective where forward passes are.

        One by one: where memory is short, nothing takes less.
        """
        found = []
        for batch in batches(self._samples, 1, self._padding, self._sharding.device):
            found.append(response_logits(model, batch)[0].cpu())
            self._sharding.reshard()
        return torch.cat(found)

    def distance(self, logits: torch.Tensor, tolerance: float, otherwise: str) -> float:
        """How far logits are from those that were measured, at most; rank 0's word counts.

        Args:
            logits: From `logits`.
            tolerance: How far they may be, as a share of the largest logit.
            otherwise: What an `OutputError` says of logits that are further apart.
        """
        size = max(1.0, float(self.measured.abs().max()))
        own = torch.tensor([float((self.measured - logits).abs().max()), size], dtype=torch.float64)
        # whole weights are read back by rank 0 alone
        distance, size = self._sharding.broadcast(own).tolist()
        if not distance <= tolerance * size:
            raise OutputError(otherwise.format(distance=f"{distance:.3g}"))
        return distance
