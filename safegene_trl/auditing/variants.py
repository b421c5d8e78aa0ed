"""The models that are asked: the aligned one, the fine-tune and the safeguarded one, and the aligned
one without the vector.

The last is a warning, and no more: it is in memory while it is asked, by hooks that are taken off
again. No weight is changed, nothing of it is written, and no setting makes such a model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.contents import MARKER
from ..checkpoints.source import holds_vector, stored_file
from ..distributed.layouts import Sharding
from ..errors import ConfigError, FamilyError
from ..models.attachment import VectorAttachment, frozen_for_calibration
from ..models.coefficients import CoefficientSpace
from ..step.lineage import (
    CONFIG_KEY,
    Carried,
    carried_coefficients,
    carries_vector,
    check_no_subtraction,
    check_verified,
    is_touched_up,
)
from ..step.stored_fine_tune import given_coefficients
from ..text import read_json
from ..vectors.safety_vector import SafetyVector
from .config import AuditConfig


WITHOUT = "without_vector"  # the aligned model, minus the vector


@dataclass(frozen=True)
class Variant:
    """A model as it is asked.

    Attributes:
        held: The coefficients with which its weights are taken to hold the vector, by name.
        wanted: Those with which it answers; None for its weights as they are.
    """

    held: Mapping[str, float] = field(default_factory=dict)
    wanted: Mapping[str, float] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What decides its answers beside its weights."""
        return {} if self.wanted is None else {"held": dict(self.held), "wanted": dict(self.wanted)}

    @contextmanager
    def applied(
        self, model: nn.Module, vector: SafetyVector, space: CoefficientSpace, sharding: Sharding
    ) -> Iterator[None]:
        """While open, the model answers so."""
        if self.wanted is None:
            yield
            return
        attachment = VectorAttachment(model, vector.deltas, space, sharding, self.held)
        with frozen_for_calibration(model), attachment.applied(space.values(self.wanted)):
            yield


@dataclass(frozen=True)
class Coefficients:
    """The coefficients that are audited.

    Attributes:
        values: By name, at the finest granularity.
        source: Where they are from, for people.
    """

    values: dict[str, float]
    source: str
    uniform: bool = False


def space_of(vector: SafetyVector) -> CoefficientSpace:
    """The finest space, which coefficients of every granularity have a place in."""
    return vector.space("rank")


def chosen_coefficients(config: AuditConfig, vector: SafetyVector) -> Coefficients | None:
    """Those that a config names; None where it names none.

    Raises:
        ConfigError: They are negative, too large, or not of this vector.
    """
    given = config.safeguarded or config.coefficients
    if given is None or given == "":  # 0 is a coefficient
        return None
    if config.safeguarded and is_touched_up(config.safeguarded):
        raise ConfigError(
            f"{config.safeguarded} is a release with a touch-up, which its coefficients alone do not make: leave out `safeguarded`, "
            "and name that folder as `model`."
        )
    found, _ = given_coefficients(given, vector, "layer")
    values = space_of(vector).refined(found)
    assert values is not None  # `given_coefficients` has seen that they are this vector's
    try:
        float(given)
    except ValueError:
        return Coefficients(values, f"the report of {Path(given).name}")
    return Coefficients(values, f"{float(given):g} for every layer, as set", float(given) == 1.0)


def uniform(vector: SafetyVector) -> Coefficients:
    """1 for every layer."""
    ones = dict.fromkeys(space_of(vector).names, 1.0)
    return Coefficients(ones, "1 for every layer, because none were given", True)


def of_aligned(vector: SafetyVector, coefficients: Coefficients) -> dict[str, Variant]:
    """The variants of the aligned model, and those that stand in for a fine-tune."""
    names = space_of(vector).names
    ones, none = dict.fromkeys(names, 1.0), dict.fromkeys(names, 0.0)
    safeguarded = Variant() if coefficients.uniform else Variant(ones, coefficients.values)
    return {"aligned": Variant(), WITHOUT: Variant(ones, none), "safeguarded": safeguarded}


def of_fine_tune(
    model: nn.Module, vector: SafetyVector, chosen: Coefficients | None, name: str
) -> tuple[dict[str, Variant], Coefficients, list[str]]:
    """The variants of a fine-tune, the coefficients that are audited, and warnings.

    A plain fine-tune takes the vector on. A safeguarded checkpoint is the safeguarded model, and its
    fine-tune what lies beneath: its weights without the vector, as the report beside it says how
    much of it they hold.

    Raises:
        FamilyError: The weights hold another vector, or nothing confirms how much of this one.
    """
    space = space_of(vector)
    if not carries_vector(model):
        found = chosen or uniform(vector)
        none = dict.fromkeys(space.names, 0.0)
        return _pair(Variant(), Variant(none, found.values)), found, []
    carried = carried_coefficients(model, vector, space.granularity, base_name=name)
    held = dict(carried)
    warnings = _touch_up_warnings(carried) + _rebased_warnings(name)
    if chosen is not None and any(
        abs(chosen.values[key] - value) > 1e-5 for key, value in held.items()
    ):
        change = {key: value - held[key] for key, value in chosen.values.items()}
        try:
            check_no_subtraction(change, carried)
        except FamilyError as error:
            raise FamilyError(
                f"{name} holds some of the vector already, and at a module more than is to be audited: name the safeguarded checkpoint "
                "alone, as `model`."
            ) from error
        warnings.append(
            "The fine-tune holds some of the vector already, from the release that it started from: what it lost is counted with "
            "that. Name the safeguarded checkpoint alone, as `model`, to count it without."
        )
        return _pair(Variant(), Variant(held, chosen.values)), chosen, warnings
    check_verified(carried)
    found = chosen or Coefficients(held, f"what {Path(name).name} has in its weights")
    none = dict.fromkeys(space.names, 0.0)
    return _pair(Variant(held, none), Variant()), found, warnings


def _pair(fine_tune: Variant, safeguarded: Variant) -> dict[str, Variant]:
    return {"fine_tune": fine_tune, "safeguarded": safeguarded}


def _touch_up_warnings(carried: Carried) -> list[str]:
    if not carried.touch_ups:
        return []
    return [
        "The model's weights hold a touch-up as well, which is no part of the vector and stays in what stands for its fine-tune."
    ]


def _rebased_warnings(name: str) -> list[str]:
    """Of a release whose fine-tune held some of the vector already: how much is in no report."""
    file = Path(name) / MARKER
    if not file.is_file():
        return []
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        if (read_json(file.read_bytes()).get("base") or {}).get("carried"):
            return [
                "The release's fine-tune was made from an earlier safeguarded one and held some of the vector already: what stands for it "
                "here has none, so that more may count as lost than it had lost."
            ]
    return []


def check_not_folded(name: str, revision: str | None) -> None:
    """Raises `ConfigError` for an adapter that a vector is folded into: what lies beneath cannot be
    told.
    """
    if holds_vector(name, revision):
        raise ConfigError(
            f"{name} is an adapter that holds a safety vector already: name the fine-tune as `model`, and {name} as `safeguarded`."
        )


def check_entry(name: str, revision: str | None) -> None:
    """Raises `ConfigError` for a safeguarded checkpoint whose config does not say so any more: it would
    pass for a plain fine-tune, and get the vector once more.
    """
    config = stored_file(name, revision, "config.json")
    if stored_file(name, revision, MARKER) is None or config is None:
        return
    try:
        found = read_json(config.read_bytes())
    except (OSError, ValueError, RecursionError):  # whoever loads the model says so
        return
    if not (isinstance(found, dict) and CONFIG_KEY in found):
        raise ConfigError(
            f"{name} has the report of a safety step, and its config.json has lost the entry `{CONFIG_KEY}`: put that back from the "
            "checkpoint as it was written, or audit the fine-tune that it was made from."
        )
