"""What is counted where seconds would tell little: copies to the device, calls of `generate`, and
passes of the search.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import GenerationMixin

from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.recalibration import objective, search


class HostToDeviceCopies(TorchDispatchMode):
    """While open, `count` is how many tensors went from the host to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            self.count += _leaves_the_host(args[0], found)
        elif func is torch.ops.aten.copy_.default:
            self.count += _leaves_the_host(args[1], args[0])
        return found


def _leaves_the_host(source: torch.Tensor, target: torch.Tensor) -> bool:
    return source.device.type == "cpu" and target.device.type != "cpu"


@dataclass
class Copies:
    """Made in some work: tensors from the host to a device, and the vector's factor pairs that were
    copied or cast.
    """

    host_to_device: int
    factors: int


def copies_of(attachment: VectorAttachment, work: Callable[[], Any]) -> Copies:
    """What `work` copies. On a CPU nothing goes to a device; the factors tell all the same."""
    before = attachment.factors.copies
    with HostToDeviceCopies() as seen:
        work()
    return Copies(seen.count, attachment.factors.copies - before)


@dataclass
class Generation:
    """Attributes:
    calls: Of `generate`.
    steps: Forward passes that each gave one more token to every row of a batch.
    tokens: New tokens of all rows.
    """

    calls: int = 0
    steps: int = 0
    tokens: int = 0


@contextmanager
def counted_generation() -> Iterator[Generation]:
    """While open, every call of `generate` is counted."""
    seen, original = Generation(), GenerationMixin.generate

    @functools.wraps(original)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(model, *args, **kwargs)
        new = found.shape[1] - kwargs["input_ids"].shape[1]
        seen.calls, seen.steps = seen.calls + 1, seen.steps + new
        seen.tokens += new * len(found)
        return found

    with patch.object(GenerationMixin, "generate", generate):
        yield seen


@dataclass
class Search:
    """Attributes:
    passes: Forward passes with a backward pass.
    seconds: Of each evaluation of loss and gradient.
    objectives: Those of the last run, the fitting and the held-out one.
    """

    passes: int = 0
    seconds: list[float] = field(default_factory=list)
    objectives: list[objective.Objective] = field(default_factory=list)

    @property
    def reference_bytes(self) -> int:
        """What the fine-tuned model says to task samples, kept while the search runs."""
        return sum(
            reference.nbytes for one in self.objectives for reference in one.reference.values()
        )


@contextmanager
def counted_search() -> Iterator[Search]:
    """While open, the passes of searches are counted. An evaluation ends with numbers on the host,
    so that its seconds are the device's too.
    """
    seen, losses, evaluate = Search(), objective.sample_losses, search.evaluate_objective

    class Noted(objective.Objective):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            seen.objectives = [*seen.objectives[-1:], self]

    def counted(*args: Any) -> torch.Tensor:
        seen.passes += torch.is_grad_enabled()
        return losses(*args)

    def timed(*args: Any) -> Any:
        started = time.perf_counter()
        found = evaluate(*args)
        seen.seconds.append(time.perf_counter() - started)
        return found

    with (
        patch.object(search, "evaluate_objective", timed),
        patch.object(search, "Objective", Noted),
        patch.object(objective, "sample_losses", counted),
    ):
        yield seen


def passes_to_1_percent(objectives: Sequence[float]) -> int | None:
    """How many evaluations a search took to come within 1 % of its own lowest objective."""
    near = [i + 1 for i, value in enumerate(objectives) if value <= 1.01 * min(objectives)]
    return near[0] if near else None
