"""λ-scaled low-rank deltas on a frozen live model, as forward hooks that are always undone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .weights import canonical_modules


@dataclass(frozen=True)
class LowRankDelta:
    """`V = B A` of one module: `a` is r×d_in, `b` is d_out×r, both float32 or a 16-bit type."""

    a: torch.Tensor
    b: torch.Tensor

    def dense(self) -> torch.Tensor:
        """`B A` as a d_out×d_in float32 matrix."""
        return self.b.float() @ self.a.float()


@contextmanager
def attached(
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    coefficient_of: Mapping[str, int],
    coefficients: torch.Tensor,
) -> Iterator[None]:
    """While open, module `m` computes `m(x) + λ·B(Ax)`, with `λ = coefficients[coefficient_of[m]]`.

    Nothing is added to the model and no dense `B A` is formed. `coefficients` (float32, shape `(n,)`) may require
    grad and may be changed in place between forward passes. Gradients flow to it through activations only.

    Args:
        model: Plain or PEFT-wrapped model, unwrapped from any engine.
        deltas: Low-rank deltas by canonical module name.
        coefficient_of: Index into `coefficients` of every module in `deltas`.
        coefficients: The λ.
    """
    modules = canonical_modules(model)
    handles = []
    try:
        for name, delta in deltas.items():
            hook = _delta_hook(delta, coefficients, coefficient_of[name])
            handles.append(modules[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _delta_hook(delta: LowRankDelta, coefficients: torch.Tensor, index: int):
    placed: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        key = (output.device, output.dtype)
        if key not in placed:
            placed[key] = (delta.a.to(*key), delta.b.to(*key))
        a, b = placed[key]
        # λ stays float32: in bfloat16 a step of 1e-4 near 0.5 would round to nothing.
        low = F.linear(x.to(output.dtype), a)
        low = low.to(torch.promote_types(low.dtype, coefficients.dtype)) * coefficients[index].to(output.device)
        return output + F.linear(low.to(output.dtype), b)

    return hook


@contextmanager
def frozen_for_calibration(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode without weight gradients; restores both, and every RNG state, in every case."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cuda_devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda_devices):
        try:
            model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, mode in training.items():
                module.training = mode
