"""λ-scaled low-rank deltas on a frozen live model, as forward hooks that are always undone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..distributed.layouts import Sharding
from .coefficients import CoefficientSpace
from .eager import running_eagerly
from .experts import Product, Samples, computing_with
from .factors import Factors
from .inputs import Batch
from .kernels import kernels_for_any_shape
from .low_rank import LowRankDelta
from .names import shared_parameter
from .parameters import canonical_modules, unadapted
from .quantized import kept_packed
from .verification import Evidence, check_effective, list_items


# a module's factors, like a tensor
_Pair = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class VectorAttachment:
    """A safety vector on a live model: its coefficients' space, its factors, and the hooks that add
    it.

    Nothing is added to the model itself, and what is attached is always taken off.

    Args:
        model: Plain or PEFT-wrapped model, unwrapped from any engine.
        deltas: The vector's low-rank deltas by canonical module name.
        space: Of its coefficients.
        sharding: How the model is spread over ranks.
        carried: By name, the coefficients with which the weights hold the vector already. Default:
            0.

    Attributes:
        evidence: What the hooks have seen.
        factors: The vector's factors; on the model's device from the first pass on, until they are
            released.
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
        self.evidence = Evidence()
        self.factors = Factors(deltas)
        self._modules = canonical_modules(model)
        self._items = list_items(deltas, self._modules)
        self._of_experts = {
            name: parameter for name in deltas if (parameter := shared_parameter(name))
        }

    def applied(self, values: torch.Tensor) -> AbstractContextManager[None]:
        """While open, module `m` computes `m(x) + B diag(λ) A x` with the λ of its rank-one parts,
        and so does each expert that lies in one parameter with others.

        No dense `B A` is formed. Gradients flow to `values` through activations only.

        Args:
            values: The λ of the whole vector, float32: n of them, or batch×n, each sample's own,
                which gives each sample's gradient; may require grad. What the weights hold already
                is taken off here.
        """
        return self._hooked(values - self._held)

    def verify(self, batch: Batch) -> list[str]:
        """Collective: passes over one short sample show that every delta reaches the logits, with
        and without gradients.

        The model is left as it was.

        Args:
            batch: One short sample, the same on every rank.

        Returns:
            Names of modules that none of its tokens was sent to: experts of a mixture.

        Raises:
            UnsupportedModelError: A module's forward is bypassed, or its output is not used; it is
                named.
        """
        values = self._held.detach().clone() + 0.5
        freeze = not self.sharding.first_pass_decides
        with frozen_for_calibration(self.model, freeze), self.sharding.forward_passes():
            for graded in (False, True):
                self.evidence = Evidence()
                with (
                    torch.set_grad_enabled(graded),
                    recomputing(self.model) if graded else nullcontext(),
                ):
                    with self.applied(values.requires_grad_(graded)):
                        logits = _logits(self.model, batch)
                        if graded and logits.requires_grad:
                            # spread out over the vocabulary: a softmax forgets what is the same for
                            # all of it
                            direction = torch.linspace(
                                -1, 1, logits.shape[-1], device=logits.device
                            )
                            torch.autograd.grad((logits.float() * direction).sum(), values)
                    self.sharding.reshard()
                waiting = check_effective(self.evidence, self._items, graded)
        self.evidence = Evidence()
        return waiting

    def check_effective(self) -> list[str]:
        """Collective: the same of all passes since `evidence` was last emptied, over all ranks."""
        known = sorted({item for own in self._items.values() for item in own})
        return check_effective(
            self.evidence.gather(list(self._items), known, self.sharding), self._items
        )

    @contextmanager
    def _hooked(self, coefficients: torch.Tensor) -> Iterator[None]:
        modules, evidence = self._modules, self.evidence
        with ExitStack() as hooks:
            for item in {item for own in self._items.values() for item in own}:
                note = _CallNote(evidence.called, item)
                hooks.callback(modules[item].register_forward_pre_hook(note).remove)
            for name in self.deltas.keys() - self._of_experts.keys():
                index = self._index[name].to(coefficients.device)
                hook = _delta_hook(
                    partial(self.factors.of, name), coefficients, index, evidence, name
                )
                hooks.callback(modules[name].register_forward_hook(hook).remove)
            for name in {parameter.rpartition(".")[0] for parameter in self._of_experts.values()}:
                experts, product = unadapted(modules[name]), self._expert_product(coefficients)
                hooks.enter_context(computing_with(experts, name, product))
            yield

    def _expert_product(self, coefficients: torch.Tensor) -> Product:
        evidence = self.evidence

        def product(
            name: str, x: torch.Tensor, out: torch.Tensor, samples: Samples
        ) -> torch.Tensor:
            if name not in self.deltas:
                return out
            evidence.fired.add(name)
            chosen = coefficients[..., self._index[name].to(coefficients.device)].to(out.device)
            chosen = chosen[None] if chosen.dim() == 1 else samples(chosen)
            reached = partial(evidence.reached.add, name)
            return _AddDelta.apply(x, out, chosen, partial(self.factors.of, name), reached)

        return product


class _CallNote:
    """Forward pre-hook that notes a call."""

    def __init__(self, called: set[str], name: str):
        self._called, self._name = called, name

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        self._called.add(self._name)


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits


def _delta_hook(
    factors: _Pair, coefficients: torch.Tensor, index: torch.Tensor, evidence: Evidence, name: str
) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
    reached = partial(evidence.reached.add, name)

    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        evidence.fired.add(name)
        chosen = coefficients[..., index].to(output.device)
        if chosen.dim() == 1:
            chosen = chosen[None]
        elif (inputs[0].numel() // inputs[0].shape[-1]) % len(chosen):
            # tokens of no even number per sample: shared out evenly
            chosen = chosen.mean(dim=0, keepdim=True)
        return _AddDelta.apply(inputs[0], output, chosen, factors, reached)

    return hook


class _AddDelta(torch.autograd.Function):
    """`output + B diag(λ) A x`, with `x` (…×d_in) and `output` (…×d_out) of one 16- or 32-bit type.

    λ is float32, samples×r, or 1 in the place of either: for all samples, for all r parts.

    The graph holds no factors, which may be fetched for each pass: the backward pass keeps only
    `Ax` (…×r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        output: torch.Tensor,
        coefficient: torch.Tensor,
        factors: _Pair,
        reached: Callable[[], None],
    ):
        a, b = factors(output)
        low = F.linear(x.to(output.dtype), a)
        ctx.save_for_backward(low, coefficient)
        ctx.factors, ctx.x_dtype, ctx.reached = factors, x.dtype, reached
        # λ stays float32: in bfloat16 a step of 1e-4 near 0.5 would round to nothing.
        return output + F.linear(_scaled(low, coefficient), b)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        (gradient,) = gradients
        ctx.reached()
        low, coefficient = ctx.saved_tensors
        a, b = ctx.factors(gradient)
        low_gradient = gradient @ b
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (_scaled(low_gradient, coefficient) @ a).to(ctx.x_dtype)
        products = (low_gradient.to(_wide(low)) * low).reshape(len(coefficient), -1, low.shape[-1])
        coefficient_gradient = (
            products.sum(dim=1).sum_to_size(coefficient.shape).to(coefficient.dtype)
        )
        return x_gradient, gradient, coefficient_gradient, None, None


def _scaled(low: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """`diag(λ) low`, in at least float32, then rounded to the type of `low` (…×r)."""
    by_sample = low.reshape(len(coefficient), -1, low.shape[-1])
    return (by_sample * coefficient.to(_wide(low))[:, None]).to(low.dtype).reshape(low.shape)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def frozen_for_calibration(model: nn.Module, freeze: bool = True) -> Iterator[None]:
    """Puts the model in eval mode without weight gradients; restores both, and every RNG state, in
    every case.

    What is compiled runs eagerly meanwhile: a compiled graph knows nothing of hooks that came after
    it. Quantised weights keep their form.

    Args:
        model: The live model.
        freeze: Whether weights get no gradients meanwhile.
    """
    training = {module: module.training for module in model.modules()}
    trainable = [
        parameter for parameter in model.parameters() if parameter.requires_grad and freeze
    ]
    cuda_devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices=cuda_devices),
        running_eagerly(model),
        kernels_for_any_shape(),
        kept_packed(model),
    ):
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


def recomputed_layers(model: nn.Module) -> list[Any]:
    """The layers whose activations `recomputing` leaves to the backward pass."""
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
        and module.gradient_checkpointing
        and not (
            isinstance(dropout := getattr(module, "dropout", None), float) and dropout > 0
        )  # it reads `training`
    ]


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """For passes with gradients: layers are recomputed in the backward pass where the training did
    so.

    A training that fits only with gradient checkpointing must not run out of memory after its last
    step. The layers' parts stay in eval mode, and non-reentrant checkpointing is used whatever the
    training chose: the other kind would ask for gradients of the inputs.
    """
    layers = recomputed_layers(model)
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


_recompute = partial(
    checkpoint, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
)
