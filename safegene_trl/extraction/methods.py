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
class Difference:
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
        make: The deltas, and what the vector is to record of them. Collective.
        distils: Whether it reads what both models answer.
        expands: Whether it does so on blocks that are linear in their weights.
    """

    make: Callable[[Difference], Made]
    distils: bool = False
    expands: bool = False


def plain(difference: Difference) -> Made:
    return dict(difference.deltas), None


def distil(difference: Difference) -> Made:
    return _learnt(difference, difference.settings())


def linearize(difference: Difference) -> Made:
    settings = replace(difference.settings(), linearized_blocks=difference.blocks)
    return _learnt(difference, settings)


def _learnt(difference: Difference, settings: DistillationSettings) -> Made:
    found, losses = distilled(
        difference.load_degraded,
        difference.deltas,
        difference.references(),
        settings,
        difference.show_progress,
    )
    kept = ("steps", "learning_rate", "anchor_weight", "linearized_blocks")
    return found, {
        **losses,
        **{key: getattr(settings, key) for key in kept},
        "processes": difference.processes,
    }


METHODS: dict[str, Method] = {
    "delta": Method(plain),
    "distill": Method(distil, distils=True),
    "linearized": Method(linearize, distils=True, expands=True),
}
