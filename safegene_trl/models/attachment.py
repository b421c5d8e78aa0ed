"""λ-scaled low-rank deltas on a frozen live model, as forward hooks that are always undone."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..calibration import Batch
from ..errors import UnsupportedModelError
from ..sharding import Sharding
from ..weights import canonical_modules
from .coefficients import CoefficientSpace
from .low_rank import LowRankDelta


class VectorAttachment:
    """A safety vector on a live model: its coefficients' space, its factors, and the hooks that add it.

    Nothing is added to the model itself, and what is attached is always taken off. The factors stay where they were loaded
    to and visit the accelerator one module at a time.

    Args:
        model: Plain or PEFT-wrapped model, unwrapped from any engine.
        deltas: The vector's low-rank deltas by canonical module name.
        space: Of its coefficients.
        sharding: How the model is spread over ranks.
        carried: By name, the coefficients with which the weights hold the vector already. Default: 0.
    """

    def __init__(
        self,
        model: nn.Module,
        deltas: Mapping[str, LowRankDelta],
        space: CoefficientSpace,
        sharding: Sharding,
        carried: Mapping[str, float] | None = None,
    ):
        self.model, self.deltas, self.space, self.sharding = model, deltas, space, sharding
        self.carried = dict(carried or dict.fromkeys(space.names, 0.0))
        self._held = space.values(self.carried).to(sharding.device)
        self._index = {name: space.index(name).to(sharding.device) for name in deltas}

    def applied(self, values: torch.Tensor) -> AbstractContextManager[None]:
        """While open, the model computes with the whole vector at these coefficients.

        Args:
            values: float32: n of them, or batch×n, each sample's own; may require grad. What the weights hold already is
                taken off here.
        """
        return attached(self.model, self.deltas, self._index, values - self._held)

    def verify(self, batch: Batch) -> None:
        """Collective: one forward and backward pass shows that every delta reaches the logits.

        A module counts as reached where its hook fires and the logits' gradient comes back to one of its coefficients. One
        expert of a mixture may stay silent where another one of its layer fires: which of them fire is up to the samples.

        Args:
            batch: One short sample.

        Raises:
            UnsupportedModelError: A module's forward is bypassed, or its output is not used; it is named.
        """
        deltas = {name: delta for name, delta in self.deltas.items() if delta.a.any() and delta.b.any()}
        ones = {name: torch.ones(1, device=self.sharding.device, requires_grad=True) for name in deltas}
        fired: set[str] = set()
        with frozen_for_calibration(self.model), self.sharding.forward_passes(), recomputing(self.model):
            with _each_attached(self.model, deltas, ones, fired):
                logits = self.model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                ).logits.float()
                # any fixed direction that is not constant over the vocabulary: a softmax would forget what is
                weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
                logits = (logits * weights * (1 + torch.arange(logits.shape[1], device=logits.device))[:, None]).sum()
                found = torch.autograd.grad(logits, list(ones.values()), allow_unused=True)
            self.sharding.release()
        alive = {
            name
            for name, gradient in zip(ones, found, strict=True)
            if name in fired and gradient is not None and bool(gradient.any())
        }
        groups = {_block_of_experts(name) for name in alive}
        silent = [name for name in deltas if name not in alive]
        bypassed = [name for name in silent if name in fired or _block_of_experts(name) not in groups - {None}]
        if bypassed:
            more = f" and {len(bypassed) - 1} more" if len(bypassed) > 1 else ""
            raise UnsupportedModelError(
                f"`{bypassed[0]}`{more} of the safety vector does not reach the logits, because the model's forward pass goes "
                "around it: switch off fused kernels and fast paths (axolotl's `lora_mlp_kernel`, `lora_qkv_kernel` and "
                "`lora_o_kernel`; Unsloth's patches), or run `safegene apply` on the finished fine-tune."
            )


@contextmanager
def _each_attached(
    model: nn.Module, deltas: Mapping[str, LowRankDelta], ones: Mapping[str, torch.Tensor], fired: set[str]
) -> Iterator[None]:
    """Every delta on with a coefficient of its own; `fired` takes the names of modules whose hook runs."""

    def note(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        fired.add(name)

    modules = canonical_modules(model)
    with ExitStack() as hooks:
        for name, delta in deltas.items():
            if name not in modules:
                continue
            handle = modules[name].register_forward_hook(
                _delta_hook(delta, ones[name], torch.zeros(1, dtype=torch.long))
            )
            hooks.callback(handle.remove)
            hooks.callback(modules[name].register_forward_hook(partial(note, name)).remove)
        yield


def _block_of_experts(name: str) -> str | None:
    """The mixture that an expert's module belongs to, with which of its parts it is; None for any other module."""
    found = re.fullmatch(r"(.+\.experts)\.\d+\.(.+)", name)
    return f"{found[1]}.{found[2]}" if found else None


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
    """Puts the model in eval mode without weight gradients; restores both, and every RNG state, in every case.

    What is compiled runs eagerly meanwhile: a compiled graph knows nothing of hooks that came after it.
    """
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cuda_devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda_devices), _eagerly():
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


def _eagerly() -> AbstractContextManager[Any]:
    """While open, whatever `torch.compile` made runs as it was written. Nothing can be compiled before dynamo is imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


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
