"""What a command takes, and how it is launched."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


# elements that DeepSpeed keeps gathered by default (`stage3_max_live_parameters`)
ZERO3_GATHERED = 10**9
# of factors that are trained: float32 itself, its last gradient, AdamW's two moments
BYTES_OF_A_NUMBER = 16


@dataclass(frozen=True)
class Cost:
    """What one step takes.

    Attributes:
        seconds: Wall-clock time.
        memory: Peak of one process, in bytes: of steps that need the whole model on the accelerator
            where there is one, else resident.
        disk: Bytes written.
        factors: Of a search, where the vector's factors will lie, as its report says it; None of
            other steps.
    """

    seconds: float
    memory: int
    disk: int = 0
    factors: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Launch:
    """How the command will be launched: processes, and whether they share out the weights (ZeRO-3,
    FSDP2).
    """

    processes: int = 1
    sharded: bool = False

    def share(self, items: int) -> float:
        """Share (0–1] of `items` that the busiest process works on."""
        return math.ceil(items / self.processes) / items if items else 1.0

    def held(self, weights: int, itemsize: int) -> int:
        """Bytes of a model's weights that a process holds while it computes."""
        if not self.sharded:
            return weights
        return min(weights, weights // self.processes + ZERO3_GATHERED * itemsize)
