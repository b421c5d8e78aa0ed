"""How deltas are made of the difference between two models: one table, which the config, the
pipeline and the estimate read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..models.low_rank import LowRankDelta
from .distillation import DistillationSettings, ReferenceBatch, distilled
from .linearization import Blocks


@dataclass(frozen=True)
class MethodInputs:
    """What a method makes its deltas of.

    Attributes:
        deltas: The plain difference of the weights, truncated, by module.
        settings: How long and how fast to learn, where it learns.
        blocks: Those that a method which expands blocks may expand.
        load_degraded: Loads the degraded model, whole or sharded as this process was launched.
            Collective.
        references: What the aligned model says to harmful prompts and the degraded one to benign
            ones; none unless the method distils. Collective.
        show_progress: Whether to show progress bars.
        processes: How many take part.
    """

    deltas: Mapping[str, LowRankDelta]
    settings: Callable[[], DistillationSettings]
    blocks: Blocks
    load_degraded: Callable[[], nn.Module]
    references: Callable[[], list[ReferenceBatch]]
    show_progress: bool
    processes: int


Made = tuple[dict[str, LowRankDelta], dict[str, Any] | None]


@dataclass(frozen=True)
class Method:
    """A way to make deltas.

    Attributes:
        make: The deltas, and what the vector is to record of them. Collective. None where they are
            made of no difference, but of directions (`transport/`).
        distils: Whether it reads what both models answer.
        expands: Whether it does so on blocks that are linear in their weights.
    """

    make: Callable[[MethodInputs], Made] | None
    distils: bool = False
    expands: bool = False


def plain(inputs: MethodInputs) -> Made:
    return dict(inputs.deltas), None


def distil(inputs: MethodInputs) -> Made:
    return _learnt(inputs, inputs.settings())


def linearize(inputs: MethodInputs) -> Made:
    settings = replace(inputs.settings(), linearized_blocks=inputs.blocks)
    return _learnt(inputs, settings)


def _learnt(inputs: MethodInputs, settings: DistillationSettings) -> Made:
    found, losses = distilled(
        inputs.load_degraded,
        inputs.deltas,
        inputs.references(),
        settings,
        inputs.show_progress,
    )
    kept = ("steps", "learning_rate", "anchor_weight", "linearized_blocks")
    return found, {
        **losses,
        **{key: getattr(settings, key) for key in kept},
        "processes": inputs.processes,
    }


METHODS: dict[str, Method] = {
    "delta": Method(plain),
    "distill": Method(distil, distils=True),
    "linearized": Method(linearize, distils=True, expands=True),
    "transport": Method(None),
}
