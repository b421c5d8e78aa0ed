"""The weights as they are shipped, in the place of a live model's own for as long as they are
measured.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..checkpoints.live_merge import merged_tensor
from ..checkpoints.merge_terms import ScaledVector
from ..distributed.layouts import Sharding
from ..models.attachment import VectorAttachment
from ..models.coefficients import CoefficientSpace
from ..models.low_rank import LowRankDelta
from ..models.parameters import Parameter, canonical_parameters, task_factors
from ..models.replacement import replaced, without_adapters
from ..models.rounding import Rounding


@contextmanager
def merged_weights(
    model: nn.Module, vector: ScaledVector, sharding: Sharding, rounding: Rounding | None = None
) -> Iterator[None]:
    """While open, the weights are those of a merged checkpoint: the LoRA folded in, added in
    float32, rounded to their data type.

    Args:
        model: The live fine-tune.
        vector: What its weights still lack.
        sharding: How the model is spread over ranks.
        rounding: Is told what the data types leave of the vector's part.
    """

    def merged(parameter: Parameter) -> torch.Tensor | None:
        """None for a tensor that is shipped as it is."""
        if not parameter.is_weight:
            return None
        if parameter.module_name not in vector.deltas and not task_factors(parameter.module):
            return None
        return merged_tensor(parameter, vector, sharding, rounding)

    with (
        replaced(list(canonical_parameters(model)), merged, sharding),
        without_adapters(model),
    ):
        yield


@contextmanager
def beside_weights(
    model: nn.Module, deltas: Mapping[str, LowRankDelta], values: torch.Tensor, sharding: Sharding
) -> Iterator[None]:
    """While open, deltas act beside the weights, as an adapter does.

    Args:
        model: The live fine-tune.
        deltas: By canonical module name.
        values: A coefficient for each rank-one part of every module, module by module.
        sharding: How the model is spread over ranks.
    """
    rank = next(iter(deltas.values())).a.shape[0]
    space = CoefficientSpace.of(deltas, [rank], "rank")
    with VectorAttachment(model, deltas, space, sharding).applied(values):
        yield
