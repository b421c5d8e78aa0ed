"""How far a repair goes: the vector alone, or the vector and a low-rank touch-up.

The cheap rung is always tried, measured and decided first. The dear one is tried where the first
leaves something to be asked for, and stands only where it is better.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from ..checkpoints.merge_terms import ScaledVector
from ..config.gate import GateConfig
from ..config.settings import SafeGeneConfig
from ..errors import ConfigError
from ..models.low_rank import LowRankDelta
from ..models.trained_deltas import plain_modules
from ..recalibration.objective import Losses
from ..recalibration.touch_up import EVERY, RANK, STEPS, TouchUp
from .decision import EXIT_CODES, Decision
from .plan import LearnedTouchUp, Plan


logger = logging.getLogger(__name__)
BOTH = "vector+touch-up"
TOUCHED_UP = "With a touch-up beside the vector held-out safety improved within the utility budget."


@dataclass(frozen=True)
class Rung:
    """A way to repair a fine-tune: what it adds to the weights, and what came of that.

    Attributes:
        added: What the weights still lack.
        taken: Whether the held-out losses speak for it.
        held_out: Held-out losses with it.
        measured: What was measured with it; None where nothing was.
        decision: What becomes of the fine-tune with it.
        rounding: What the data types leave of it; None where nothing is merged into live weights.
        logits: Of the probe, where it was measured.
    """

    added: ScaledVector
    taken: bool
    held_out: Losses
    measured: dict[str, Any] | None
    decision: Decision
    rounding: dict[str, Any] | None
    logits: torch.Tensor


def check_repair(config: SafeGeneConfig, deltas: Mapping[str, LowRankDelta]) -> None:
    """Raises `ConfigError` where a touch-up is asked for and there is no module to train one on."""
    if config.search.repair == BOTH and not plain_modules(deltas):
        raise ConfigError(
            f"`search.repair` is `{BOTH}`, and the vector is on nothing but experts that lie in one parameter, which get no "
            "touch-up: set it to `vector`, or use a vector that is on linear layers as well."
        )


def climbed(
    plan: Plan,
    vector: Rung,
    train: Callable[[], tuple[TouchUp, ScaledVector]],
    weigh: Callable[[ScaledVector, Losses], Rung],
) -> tuple[Rung, LearnedTouchUp | None]:
    """The rung that stands, and what was learned for it: the vector's, or the one above it where
    that is asked for, needed and better. The report says which, and why.

    Args:
        plan: With the settings, and the report.
        vector: The vector's rung.
        train: Trains a touch-up beside the vector; gives what the weights then lack, too.
        weigh: Makes a rung of what is added, with its held-out losses.
    """
    if plan.config.search.repair != BOTH:
        return vector, None
    if suffices(plan.config.gate, vector.decision):
        _say(plan, "vector", "The vector alone keeps every limit of the gate for sure.")
        return vector, None
    found, added = train()
    record = record_of(found, vector.held_out, plan.clock.phases["touch_up"]["seconds"])
    if not found.accepted or found.held_out is None:
        _say(plan, "vector", f"No touch-up is taken: {found.reason}.", record)
        return vector, None
    both = weigh(added, found.held_out)
    if is_worse(both.decision, vector.decision):
        why = (
            f"No touch-up is taken: the outcome with it is {words_of(both.decision)}, and with the vector alone "
            f"{words_of(vector.decision)}."
        )
        _say(plan, "vector", why, record)
        return vector, None
    learned = LearnedTouchUp(RANK, file_content(found.deltas))
    why = (
        f"{_why_needed(plan.config.gate, vector.decision)}; the touch-up is taken: {found.reason}."
    )
    _say(plan, BOTH, why, record | {"sha256": learned.mark["sha256"]})
    return both, learned


def _why_needed(gate: GateConfig | None, alone: Decision) -> str:
    """Why the vector alone was not enough, the beginning of a sentence."""
    lacking = dict.fromkeys(f"`{check.limit}`" for check in alone.checks if check.verdict != "kept")
    if gate and gate.names and lacking:
        return f"The vector alone did not keep {' and '.join(lacking)} for sure"
    if gate and gate.names:
        return f"The outcome with the vector alone is {words_of(alone)}"
    return "No limit of the gate says that the vector alone is enough"


def _say(plan: Plan, rung: str, why: str, record: dict[str, Any] | None = None) -> None:
    trained = {} if record is None else {"touch_up": record}
    plan.report.repair = {"rung": rung, "reason": why, **trained}
    if plan.sharding.is_main:
        logger.info("%s", why)


def suffices(gate: GateConfig | None, decision: Decision) -> bool:
    """Whether a rung reaches what the gate asks: every limit is kept for sure. Where there is no
    limit, nothing says that it does.
    """
    return bool(gate and gate.names) and decision.outcome == "accepted"


def is_worse(one: Decision, other: Decision) -> bool:
    """Whether the first outcome is worse than the second."""
    return EXIT_CODES[one.outcome] > EXIT_CODES[other.outcome]


def words_of(decision: Decision) -> str:
    """A decision's outcome, like `accepted best effort`."""
    return decision.outcome.replace("_", " ")


def with_touch_up(vector: ScaledVector, deltas: Mapping[str, LowRankDelta]) -> ScaledVector:
    """A vector and a touch-up as one: rank-one parts of the touch-up stand after the vector's, with
    coefficient 1.
    """
    stacked, coefficients = dict(vector.deltas), dict(vector.coefficients)
    for name, more in deltas.items():
        own = vector.deltas[name]
        stacked[name] = LowRankDelta(
            torch.cat([own.a.float(), more.a]), torch.cat([own.b.float(), more.b], dim=1)
        )
        ones = torch.ones(more.a.shape[0])
        coefficients[name] = torch.cat([torch.as_tensor(vector.coefficients[name]), ones])
    return ScaledVector(stacked, coefficients)


def file_content(deltas: Mapping[str, LowRankDelta]) -> bytes:
    """A touch-up's factors as a safetensors file."""
    tensors = {}
    for name, delta in deltas.items():
        tensors[f"{name}.lora_A.weight"] = delta.a.contiguous()
        tensors[f"{name}.lora_B.weight"] = delta.b.contiguous()
    return save(tensors, metadata={"format": "pt"})


def record_of(found: TouchUp, before: Losses, seconds: float) -> dict[str, Any]:
    """What the report says of a touch-up that was trained."""
    held_out = {"before": before.to_dict()}
    if found.held_out is not None:
        held_out["after"] = found.held_out.to_dict()
    return {
        "accepted": found.accepted,
        "reason": found.reason,
        "rank": RANK,
        "modules": len(found.deltas),
        "steps": STEPS,
        "every": EVERY,
        "held_out_by_step": [
            {"step": step, "objective": value} for step, value in found.held_out_by_step
        ],
        "held_out": held_out,
        "seconds": round(seconds, 3),
    }
