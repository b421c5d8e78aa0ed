"""Low-rank deltas that are trained beside a frozen live model, as forward hooks that are always undone."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .low_rank import LowRankDelta
from .names import shared_parameter
from .parameters import canonical_modules


Pair = tuple[torch.Tensor, torch.Tensor]


def plain_modules(names: Iterable[str]) -> list[str]:
    """Those that are linear modules of their own, and no expert that lies in one parameter with
    others.
    """
    return [name for name in names if shared_parameter(name) is None]


class TrainedDeltas:
    """A LoRA (arXiv 2106.09685) of scale 1 on every plain linear module that a vector is on.

    `A` (r×d_in) is drawn evenly between ±1/√d_in and `B` (d_out×r) is 0, so that at first nothing is
    added.

    Args:
        model: Plain or PEFT-wrapped model, unwrapped from any engine; nothing is added to it itself.
        deltas: The vector's, by canonical module name: for names and shapes.
        rank: r.
        generator: Draws `A`, on the CPU, in the order of `deltas`.
        device: Where the factors lie, float32.
    """

    def __init__(
        self,
        model: nn.Module,
        deltas: Mapping[str, LowRankDelta],
        rank: int,
        generator: torch.Generator,
        device: torch.device,
    ):
        self._modules = canonical_modules(model)
        self._pairs: dict[str, Pair] = {}
        for name in plain_modules(deltas):
            columns, rows = deltas[name].a.shape[1], deltas[name].b.shape[0]
            bound = 1 / math.sqrt(columns)
            a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
            b = torch.zeros(rows, rank)
            self._pairs[name] = (
                a.to(device).requires_grad_(),
                b.to(device).requires_grad_(),
            )

    @property
    def parameters(self) -> list[torch.Tensor]:
        """`A` and `B` of every module, in order: leaves of the graph."""
        return [factor for pair in self._pairs.values() for factor in pair]

    @property
    def values(self) -> torch.Tensor:
        """A copy of all their numbers, one after the other: float32, on the CPU."""
        return torch.cat([each.detach().cpu().flatten() for each in self.parameters])

    def deltas(self, values: torch.Tensor) -> dict[str, LowRankDelta]:
        """Numbers in the order of `values` as deltas by module name."""
        shaped = iter(self.shaped(values))
        return {name: LowRankDelta(next(shaped), next(shaped)) for name in self._pairs}

    def shaped(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Numbers in the order of `values`, each in its factor's shape."""
        parts = values.split([each.numel() for each in self.parameters])
        return [part.view(each.shape) for part, each in zip(parts, self.parameters, strict=True)]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While open, module `m` computes `m(x) + B A x`; gradients flow to `A` and `B`."""
        with ExitStack() as hooks:
            for name, pair in self._pairs.items():
                hook = self._modules[name].register_forward_hook(_hook(pair))
                hooks.callback(hook.remove)
            yield


def _hook(pair: Pair) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        # the device first: to change both at once torch would cast on the CPU
        a, b = (factor.to(output.device).to(output.dtype) for factor in pair)
        return output + F.linear(F.linear(inputs[0].to(output.dtype), a), b)

    return hook
