"""Blocks of a model as first-order Taylor expansions in the vector's weights, after EnchTable
(arXiv 2511.09880).

    f_lin(x; θ₀ + V) = f(x; θ₀) + J_θ f(x; θ₀) V,

a Jacobian-vector product over a whole attention or MLP block, so that what is learned is linear in
the weights, as merging supposes. Over a single linear layer it would change nothing: that is linear
in its weights already. EnchTable trains a harmful model that way and takes the difference; here it
is the distilled factors that are trained so, on refusals and benign answers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.func import jvp

from ..errors import UnsupportedModelError
from ..models.names import layer_index
from ..models.parameters import base_model, canonical_modules


Blocks = Literal["attention", "mlp", "both"]


def blocks_of(model: PeftModel, kind: Blocks, adapter: str) -> list[nn.Module]:
    """The attention or MLP blocks (or both kinds) that a LoRA has layers in: the parts that a
    transformer layer consists of.

    Raises:
        UnsupportedModelError: There are none.
    """
    modules = canonical_modules(model)
    parts = {
        _part(name)
        for name, module in modules.items()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }
    found = [
        part
        for part in sorted(part for part in parts if part is not None)
        if kind == "both" or (kind == "attention") == ("attn" in part or "attention" in part)
    ]
    if not found:
        raise UnsupportedModelError(
            f"The model has no blocks of the kind `{kind}` to linearise: use `method: distill`."
        )
    return [modules[part] for part in found]


def _part(name: str) -> str | None:
    """`model.layers.3.mlp` of `model.layers.3.mlp.up_proj`; None of a module that is no part's
    part.
    """
    words = name.split(".")
    depth = 2 + next(
        (position for position, word in enumerate(words) if word.isdigit()), len(words)
    )
    return ".".join(words[:depth]) if layer_index(name) is not None and len(words) > depth else None


@contextmanager
def linearized(model: PeftModel, blocks: Sequence[nn.Module], adapter: str) -> Iterator[None]:
    """While open, each block is linear in the weights of one LoRA; gradients flow to its factors.

    Args:
        model: The model. Its attention is computed eagerly meanwhile: the fused kernels have no
            forward derivative.
        blocks: Modules that give a tensor, or a tuple of which only the first is used.
        adapter: Name of the LoRA that the blocks are expanded in.
    """
    base = base_model(model)
    attention = base.config._attn_implementation
    forwards = [block.forward for block in blocks]
    try:
        base.set_attn_implementation("eager")
        for block in blocks:
            block.forward = _expanded(block, adapter)
        yield
    finally:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        base.set_attn_implementation(attention)


def _expanded(block: nn.Module, adapter: str):
    """The block's forward pass as value and slope at scale 0 of the LoRA, which is linear in its
    scale.
    """
    forward = block.forward
    layers: list[Any] = [
        module
        for module in block.modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    ]
    scales = [layer.scaling[adapter] for layer in layers]

    def run(*args: Any, **kwargs: Any) -> Any:
        rest: list[Any] = []

        def at(scale: torch.Tensor) -> torch.Tensor:
            for layer, full in zip(layers, scales, strict=True):
                layer.scaling[adapter] = scale * full
            output = forward(*args, **kwargs)
            rest[:] = [None] * (len(output) - 1) if isinstance(output, tuple) else []
            return output[0] if isinstance(output, tuple) else output

        device = next(block.parameters()).device
        try:
            value, slope = jvp(
                at, (torch.zeros((), device=device),), (torch.ones((), device=device),)
            )[:2]
        finally:
            for layer, full in zip(layers, scales, strict=True):
                layer.scaling[adapter] = full
        return (value + slope, *rest) if rest else value + slope

    return run
