"""Other tensors in the place of a live model's own, for a while: the weights that are shipped,
measured before they are.

What a checkpoint will hold is not what a fine-tune computes with a LoRA and a vector beside its
weights: it is added up and rounded. What is decided about it is therefore measured with those very
tensors in place.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from ..distributed.layouts import Sharding
from .parameters import Parameter


@contextmanager
def replaced(
    parameters: Iterable[Parameter],
    value: Callable[[Parameter], torch.Tensor | None],
    sharding: Sharding,
) -> Iterator[None]:
    """While open, live tensors hold other values; afterwards, in every case, their own again, bit
    by bit.

    Collective. Only one whole tensor beyond the kept originals is in memory at a time; the
    originals are kept on the CPU.

    Args:
        parameters: The tensors, in the same order on every rank.
        value: Gives the whole tensor that takes a parameter's place: on every rank that holds whole
            weights, on rank 0 where they are sharded. None leaves the parameter as it is; it must
            be None on all ranks or on none that counts.
        sharding: How the model is spread over ranks.
    """
    with ExitStack() as undo:
        for parameter in parameters:
            sharding.overwrite(parameter.tensor, value(parameter), undo)
        try:
            yield
        finally:
            sharding.reshard()


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While open, LoRA layers, and embeddings with trained tokens, compute with their base weight
    alone: what they add is in the weight, or in another adapter.
    """
    kinds = (LoraLayer, TrainableTokensLayer)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
    states = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer._disable_adapters = state
