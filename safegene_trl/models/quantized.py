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
def kept_codes(layer: Any, weight: torch.Tensor) -> float:
    """Which share of a quantised layer's numbers are those that a weight is quantised to.

    Of its own weight all are, but for what another device rounds otherwise. The layer is only read,
    in the form in which it was loaded.

    Args:
        layer: One of bitsandbytes' layers.
        weight: What it may have been made of: d_out×d_in, float32, on the CPU.
    """
    import bitsandbytes.functional as quantising

    _as_loaded(layer)
    own = layer.weight
    if own.shape.numel() == 0 or own.is_floating_point():
        # 8-bit layers may keep their weights, and quantise each pass
        return _share(own.detach().cpu().reshape(weight.shape), weight.to(own.dtype))
    if (state := getattr(own, "quant_state", None)) is not None:
        again, _ = quantising.quantize_4bit(
            weight.to(own.device, state.dtype),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            quant_storage=own.data.dtype,
        )
        here, there = (each.reshape(-1).view(torch.uint8) for each in (own.data, again))
        # two numbers lie in each byte
        halves = (_share(here & 15, there & 15), _share(here >> 4, there >> 4))
        return sum(halves) / 2
    again, *_ = quantising.int8_vectorwise_quant(weight.to(own.device, torch.float16))
    return _share(own.data, again)


def _share(here: torch.Tensor, there: torch.Tensor) -> float:
    """Of numbers that are the same."""
    return float((here == there).float().mean()) if here.numel() == there.numel() else 0.0


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
