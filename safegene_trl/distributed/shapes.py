"""What a sharded model's tensors and class would be if it were whole."""

import torch
from torch import nn


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """Shape of the whole tensor, whatever part of it this rank holds."""
    return getattr(tensor, "ds_shape", tensor.shape)


def class_name(model: nn.Module) -> str:
    """Name of the model's own class; `fully_shard` puts another in front of it."""
    from torch.distributed.fsdp import FSDPModule

    return next(cls.__name__ for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
