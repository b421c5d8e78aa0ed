"""Attention by kernels that take a new shape as it comes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kernels_for_any_shape() -> Iterator[None]:
    """While open, cuDNN's attention is not used; its place is taken by the other kernels.

    cuDNN plans each shape when it first meets it. In a training all batches can have one shape.
    Here hardly two have the same, and while an answer is generated every token makes the keys
    longer: on an H200 the plans took longer than the attention.
    """
    backends = torch.backends.cuda
    used = backends.cudnn_sdp_enabled()
    backends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        backends.enable_cudnn_sdp(used)
