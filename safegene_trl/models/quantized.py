"""Linear layers that bitsandbytes holds in 4 or 8 bits: which they are, and what weights they stand
for.

The package itself need not be there: a model without such layers is told by their classes' names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


_LAYERS = ("Linear4bit", "Linear8bitLt")
_LAYS_OUT_ANEW = "support_avx512bf16_for_cpu"


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes' linear layers; the layer itself, not an adapter on
    it.
    """
    return any(
        kind.__name__ in _LAYERS and kind.__module__.startswith("bitsandbytes.")
        for kind in type(module).__mro__
    )


def is_transposed_in_files(layer: Any) -> bool:
    """Whether checkpoint files hold a quantised layer's weight as `(d_in, d_out)`, as GPT-2's do."""
    source = getattr(layer, "source_cls", None)
    return isinstance(source, type) and issubclass(source, Conv1D)


def weight_shape(layer: Any) -> torch.Size:
    """The shape that checkpoint files give a quantised layer's weight, whose own tensor is packed."""
    shape = (layer.out_features, layer.in_features)
    return torch.Size(reversed(shape) if is_transposed_in_files(layer) else shape)


def describe_quantized(model: nn.Module) -> str | None:
    """How a model's base is quantised, e.g. `4-bit base (bitsandbytes, nf4)`; None where it is not."""
    layer: Any = next((module for module in model.modules() if is_quantized(module)), None)
    if layer is None:
        return None
    if kind := getattr(layer.weight, "quant_type", None):
        twice = ", double quantisation" if layer.weight.compress_statistics else ""
        return f"4-bit base (bitsandbytes, {kind}{twice})"
    return "8-bit base (bitsandbytes)"


@torch.no_grad()
def dequantized(layer: Any) -> torch.Tensor:
    """The weight that a quantised layer stands for: d_out×d_in, float32, on the CPU. The layer is
    only read, in the form in which it was loaded.
    """
    _as_loaded(layer)
    weight = layer.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).float().cpu()
    if weight.is_floating_point():  # 8-bit layers may keep their weights, and quantise each pass
        return weight.detach().float().cpu()
    # the first pass moves the rows' largest numbers from the weight to the layer
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return (weight.data.float() * (scales.float() / 127)[:, None]).cpu()


def _as_loaded(layer: Any) -> None:
    """Takes a CPU's own layout back (see `kept_packed`), as bitsandbytes does to save a layer."""
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()


@contextmanager
def kept_packed(model: nn.Module) -> Iterator[None]:
    """While open, passes leave 4-bit weights in the form in which they were loaded.

    On a CPU with bfloat16 instructions bitsandbytes lays a weight out anew in the first pass
    without gradients. What it has then is rounded once more, and lets no gradient through.
    """
    layers: list[Any] = [
        module for module in model.modules() if getattr(module, _LAYS_OUT_ANEW, False)
    ]
    try:
        for layer in layers:
            _as_loaded(layer)
            setattr(layer, _LAYS_OUT_ANEW, False)
        yield
    finally:
        for layer in layers:
            setattr(layer, _LAYS_OUT_ANEW, True)
