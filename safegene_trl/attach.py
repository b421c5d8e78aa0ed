"""λ-scaled low-rank deltas on a frozen live model, as forward hooks that are always undone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .weights import canonical_modules


@dataclass(frozen=True)
class LowRankDelta:
    """`V = B A` of one module: `a` is r×d_in, `b` is d_out×r, both float32 or a 16-bit type."""

    a: torch.Tensor
    b: torch.Tensor

    def dense(self) -> torch.Tensor:
        """`B A` as a d_out×d_in float32 matrix."""
        return self.b.float() @ self.a.float()

    def inner(self, other: "LowRankDelta") -> float:
        """Frobenius inner product with another delta of the module: `Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ)`, no dense matrix formed."""
        a, b, other_a, other_b = (tensor.double() for tensor in (self.a, self.b, other.a, other.b))
        return float(((b.T @ other_b) * (a @ other_a.T)).sum())

    def to(self, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` and `B` with the device and dtype of another tensor."""
        return self.a.to(other), self.b.to(other)


@contextmanager
def attached(
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    coefficient_of: Mapping[str, int | torch.Tensor],
    coefficients: torch.Tensor,
) -> Iterator[None]:
    """While open, module `m` computes `m(x) + B diag(λ) A x`, with `λ = coefficients[coefficient_of[m]]`.

    Nothing is added to the model and no dense `B A` is formed. `coefficients` may require grad and may be changed in place
    between forward passes. Gradients flow to it through activations only.

    Args:
        model: Plain or PEFT-wrapped model, unwrapped from any engine.
        deltas: Low-rank deltas by canonical module name.
        coefficient_of: Index into `coefficients` of every module in `deltas`, or of each of its r rank-one parts.
        coefficients: The λ, float32: n of them, or batch×n, each sample's own, which gives each sample's gradient.
    """
    modules = canonical_modules(model)
    handles = []
    try:
        for name, delta in deltas.items():
            hook = _delta_hook(delta, coefficients, torch.as_tensor(coefficient_of[name]).reshape(-1))
            handles.append(modules[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _delta_hook(delta: LowRankDelta, coefficients: torch.Tensor, index: torch.Tensor):
    index = index.to(coefficients.device)

    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        chosen = coefficients[..., index].to(output.device)
        if chosen.dim() == 1:
            chosen = chosen[None]
        elif (inputs[0].numel() // inputs[0].shape[-1]) % len(chosen):
            chosen = chosen.mean(dim=0, keepdim=True)  # tokens of no even number per sample: shared out evenly
        return _AddDelta.apply(inputs[0], output, chosen, delta)

    return hook


class _AddDelta(torch.autograd.Function):
    """`output + B diag(λ) A x`, with `x` (…×d_in) and `output` (…×d_out) of one 16- or 32-bit type.

    λ is float32, samples×r, or 1 in the place of either: for all samples, for all r parts.

    The factors stay where the vector was loaded to, in file-backed host memory that all ranks of a node share, and visit
    the accelerator one module at a time: they are fetched anew for the backward pass, which keeps only `Ax` (…×r).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, output: torch.Tensor, coefficient: torch.Tensor, delta: LowRankDelta):
        a, b = delta.to(output)
        low = F.linear(x.to(output.dtype), a)
        ctx.save_for_backward(low, coefficient)
        ctx.delta, ctx.x_dtype = delta, x.dtype
        # λ stays float32: in bfloat16 a step of 1e-4 near 0.5 would round to nothing.
        return output + F.linear(_scaled(low, coefficient), b)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        (gradient,) = gradients
        low, coefficient = ctx.saved_tensors
        a, b = ctx.delta.to(gradient)
        low_gradient = gradient @ b
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (_scaled(low_gradient, coefficient) @ a).to(ctx.x_dtype)
        products = (low_gradient.to(_wide(low)) * low).reshape(len(coefficient), -1, low.shape[-1])
        coefficient_gradient = products.sum(dim=1).sum_to_size(coefficient.shape).to(coefficient.dtype)
        return x_gradient, gradient, coefficient_gradient, None


def _scaled(low: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """`diag(λ) low`, in at least float32, then rounded to the type of `low` (…×r)."""
    by_sample = low.reshape(len(coefficient), -1, low.shape[-1])
    return (by_sample * coefficient.to(_wide(low))[:, None]).to(low.dtype).reshape(low.shape)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


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


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """For passes with gradients: layers are recomputed in the backward pass where the training did so.

    A training that fits only with gradient checkpointing must not run out of memory after its last step. The layers' parts
    stay in eval mode, and non-reentrant checkpointing is used whatever the training chose: the other kind would ask for
    gradients of the inputs.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
        and module.gradient_checkpointing
        and not (isinstance(dropout := getattr(module, "dropout", None), float) and dropout > 0)  # it reads `training`
    ]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
            layer._gradient_checkpointing_func = _recompute
        yield
    finally:
        for layer, function, mode in zip(layers, functions, modes, strict=True):
            layer.training = mode
            layer._gradient_checkpointing_func = function


_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
