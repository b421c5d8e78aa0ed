"""What a checkpoint says about the vector in its weights, so that a vector is never added twice.

A safeguarded checkpoint's `config.json` names its vector and coefficients, and a fine-tune of it
inherits that entry. Such a fine-tune is *re-based*: its coefficients stay those of the whole
vector, bounds included, and only their change is added. A touch-up that was released with a vector
is named there too and stays: it is a part of the weights that the fine-tune started from, and
nothing of it is ever taken out.

The entry is a claim, and −V removes refusals. So it is held against what is known of the earlier
release: the report beside the checkpoint that the fine-tune started from, the report that
`search.warm_start` names, the releases in `output.history`. What none of them confirms is
*unverified*, and then no coefficient may get smaller than it claims to be: what would be taken out
may never have been put in.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from ..checkpoints.contents import MARKER
from ..checkpoints.source import holds_vector, stored_file
from ..config.search import LARGEST_COEFFICIENT, Granularity
from ..config.settings import SafeGeneConfig
from ..errors import ConfigError, FamilyError
from ..models.names import without_wrapper
from ..provenance import sha256_of_json
from ..vectors.files import WEIGHTS_FILE
from ..vectors.safety_vector import SafetyVector
from .history import read_history


if TYPE_CHECKING:
    from torch import nn


CONFIG_KEY = "safegene"
Coefficients = dict[str, float]
TouchUpMark = dict[str, Any]  # `rank`, and `sha256` of the factors' file
# Coefficients pass through float32 (2⁻²⁴ of their size) and JSON: taking the same ones again gives
# changes of about 1e-7 times them.
ROUNDING = 1e-5
_BESIDE = "the report beside"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Carried(dict[str, float]):
    """Coefficients with which a model's weights hold the vector already, by name.

    Attributes:
        source: What confirms them, e.g. the report beside the checkpoint; None where nothing does,
            or nothing is carried.
        touch_ups: What the weights say that they hold of touch-ups, the oldest first.
    """

    def __init__(
        self,
        coefficients: Mapping[str, float],
        source: str | None = None,
        touch_ups: Sequence[TouchUpMark] = (),
    ):
        super().__init__(coefficients)
        self.source, self.touch_ups = source, list(touch_ups)

    @property
    def verified(self) -> bool | None:
        """Whether something confirms them; None where the weights claim to hold nothing."""
        return self.source is not None if any(self.values()) else None

    @property
    def record(self) -> dict[str, Any] | None:
        """For the report: whether they are verified, and by what; None where nothing is carried."""
        words = {True: "verified", False: "unverified"}
        return (
            None
            if self.verified is None
            else {"claim": words[self.verified], "source": self.source}
        )

    @property
    def warnings(self) -> list[str]:
        """A sentence where nothing confirms them."""
        if self.verified is not False:
            return []
        return [
            "Nothing confirms the coefficients that the model's config.json says its weights carry (no report of the earlier release, "
            "no history): no coefficient is taken below them."
        ]


@dataclass(frozen=True)
class _Evidence:
    """What an earlier release says that it has put into its weights; a history's record does not
    say which touch-ups (None).
    """

    source: str
    vector: str | None
    coefficients: Coefficients
    touch_ups: list[TouchUpMark] | None


@dataclass(frozen=True)
class _Reported:
    """What the report of a release says of its weights.

    Attributes:
        vector: SHA-256 of the vector's weights.
        coefficients: By name.
        touch_ups: Those in its weights, the oldest first.
        is_touched_up: Whether the last of them was learned for this release.
    """

    vector: str | None
    coefficients: Coefficients
    touch_ups: list[TouchUpMark]
    is_touched_up: bool


def mark(
    vector: SafetyVector,
    coefficients: Mapping[str, float],
    touch_ups: Sequence[TouchUpMark] = (),
) -> dict[str, Any]:
    """What goes into the `config.json` of a checkpoint that holds the vector with these
    coefficients, and touch-ups, the oldest first.
    """
    entry = {"vector": vector_id(vector), "coefficients": dict(coefficients)}
    entry |= {"sha256": sha256_of_json(entry)}  # as it was before there were touch-ups
    return {CONFIG_KEY: entry | ({"touch_ups": list(touch_ups)} if touch_ups else {})}


def vector_id(vector: SafetyVector) -> str | None:
    """SHA-256 of the vector's weights: what coefficients belong to. None for one that was never
    saved.
    """
    return vector.files.get(WEIGHTS_FILE, {}).get("sha256")


def carried_coefficients(
    model: "nn.Module",
    vector: SafetyVector,
    granularity: Granularity,
    config: SafeGeneConfig | None = None,
    base_name: str | None = None,
    base_revision: str | None = None,
) -> Carried:
    """The coefficients with which the model's weights hold the vector already, by name; all 0 where
    it holds none.

    Args:
        model: Its `config` may have the entry of an earlier safety step.
        vector: The vector.
        granularity: Of the coefficients that are wanted.
        config: Brings the bound of coefficients, and `search.warm_start` and `output.history` to
            hold the entry against.
        base_name: Directory or hub id of the checkpoint that the fine-tune started from, whose
            report it is held against.
        base_revision: Its revision.

    Raises:
        FamilyError: The weights hold another vector, or this one with coefficients of another
            granularity, out of bounds, or others than the earlier release's report says.
        SafeGeneError: The history cannot be read.
    """
    space = vector.space(granularity)
    entry = _entry(model)
    if entry is None:
        return Carried(dict.fromkeys(space.names, 0.0))
    claimed, touch_ups = _claimed(entry, vector), _claimed_touch_ups(entry)
    fitting = space.refined(claimed)
    if fitting is None:
        raise FamilyError(
            "The fine-tune started from a checkpoint that holds this vector with other kinds of coefficients: set `search.granularity` to "
            "that of the earlier release."
        )
    largest = LARGEST_COEFFICIENT if config is None else config.search.max_coefficient
    for name, value in claimed.items():
        if value > largest + ROUNDING:
            raise FamilyError(
                f"The model's config.json says that its weights hold {value:g} times the vector at `{name}`, more than "
                f"`search.max_coefficient` ({largest:g}): fine-tune the checkpoint as it was released, or raise the bound if that is right."
            )
    source = None
    for evidence in _evidence(vector, config, base_name, base_revision):
        difference = _difference(claimed, evidence.coefficients)
        if difference is None and evidence.touch_ups not in (None, touch_ups):
            difference = "touch_ups"
        if evidence.vector == vector_id(vector) and difference is None:
            source = evidence.source
            break
        if evidence.source.startswith(_BESIDE):
            raise FamilyError(
                f"The model's config.json and {evidence.source} do not say the same about the vector in its weights"
                f"{f' (`{difference}`)' if difference else ''}: fine-tune the checkpoint as it was released."
            )
    return Carried(fitting, source, touch_ups)


def check_verified(carried: Carried) -> None:
    """Raises `FamilyError` where nothing confirms what is carried: a search that may not take less
    would be cut off, or refused after it.
    """
    if carried.verified is False:
        raise FamilyError(
            "The model's config.json says that its weights hold the vector already, and nothing confirms how much of it: name the "
            "report of the release that the fine-tune started from as `search.warm_start`, or the `output.history` that it is in."
        )


def check_no_subtraction(change: Mapping[str, float], carried: Carried | None = None) -> None:
    """Raises `FamilyError` where a step would take out of the weights what they may never have
    held.

    Where the carried coefficients are verified a change may take back as much as they are: the sum
    stays 0 or more. Otherwise no change may be negative.

    Args:
        change: What is about to be added to the weights, in vectors, by coefficient name.
        carried: From `carried_coefficients`.
    """
    held: Mapping[str, float] = carried if carried is not None and carried.verified else {}
    for name, value in change.items():
        if not math.isfinite(value):
            raise FamilyError(
                f"The change of the coefficient of `{name}` is {value}: it must be a finite number."
            )
        if value < -held.get(name, 0.0) - ROUNDING:
            raise FamilyError(
                f"This would subtract {-value:.3g} times the vector at `{name}`, and nothing confirms that the weights hold so much of "
                "it: name the report of the release that the fine-tune started from as `search.warm_start`, or its `output.history`, or give no "
                "smaller coefficients."
            )


def _claimed(entry: Any, vector: SafetyVector) -> Coefficients:
    """The coefficients in an entry of a `config.json`, if it is whole and about this vector."""
    try:
        found = dict(entry["coefficients"].items())
        sound = bool(found) and all(
            isinstance(name, str) and _is_coefficient(value) for name, value in found.items()
        )
        body = {key: entry[key] for key in ("vector", "coefficients")}
        sound = sound and entry.get("sha256", sha256_of_json(body)) == sha256_of_json(body)
        same = entry["vector"] == vector_id(vector)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged() from error
    if not sound:
        raise _damaged()
    if not same:
        raise FamilyError(
            "The fine-tune started from a checkpoint that holds another safety vector: fine-tune the plain checkpoint, or go on "
            "with the vector that is in it."
        )
    return canonical(found)


def _claimed_touch_ups(entry: Mapping[str, Any]) -> list[TouchUpMark]:
    """The touch-ups in an entry of a `config.json`; an older one has none."""
    found = entry.get("touch_ups", [])
    sound = isinstance(found, list) and all(
        isinstance(each, dict)
        and each.keys() == {"rank", "sha256"}
        and type(each["rank"]) is int
        and each["rank"] > 0
        and isinstance(each["sha256"], str)
        and _SHA256.fullmatch(each["sha256"])
        for each in found
    )
    if not sound:
        raise _damaged()
    return list(found)


def canonical(coefficients: Mapping[str, float]) -> Coefficients:
    """Their names as they are today: earlier versions kept the wrapper's part of a module's name."""
    return {without_wrapper(name): value for name, value in coefficients.items()}


def _damaged() -> FamilyError:
    return FamilyError(
        f"The entry `{CONFIG_KEY}` in the model's config.json is damaged: start from the checkpoint as it was written."
    )


def _is_coefficient(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST_COEFFICIENT


def _difference(ones: Coefficients, others: Coefficients) -> str | None:
    """The first name at which two sets of coefficients differ by more than rounding, None where
    they are the same.
    """
    for name in [*ones, *others]:
        if name not in ones or name not in others or not abs(ones[name] - others[name]) <= ROUNDING:
            return name
    return None


def _evidence(
    vector: SafetyVector,
    config: SafeGeneConfig | None,
    base_name: str | None,
    base_revision: str | None,
) -> Iterator[_Evidence]:
    """What is known of earlier releases, the nearest first."""
    report = None if base_name is None else _report_beside(base_name, base_revision)
    if report is not None:
        yield _evidence_of(f"{_BESIDE} {base_name}", _report_content(report))
    if config is not None and config.search.warm_start is not None:
        given = config.search.warm_start
        yield _evidence_of(f"the report {given}", _report_about(given, vector))
    if config is not None and config.output.history is not None:
        for release in reversed(read_history(Path(config.output.history))):
            yield _Evidence(
                f"the history {config.output.history}",
                release["vector"]["sha256"],
                canonical(release["coefficients"]),
                None,
            )


def _evidence_of(source: str, found: _Reported) -> _Evidence:
    return _Evidence(source, found.vector, found.coefficients, found.touch_ups)


def _report_beside(name_or_path: str, revision: str | None) -> Path | None:
    """The report beside a checkpoint's weights; None where there is none, or it is not to be had."""
    path = Path(name_or_path)
    if not path.is_dir():
        try:
            return Path(hf_hub_download(name_or_path, MARKER, revision=revision))
        except (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            OSError,
        ):
            return None
    return path / MARKER if (path / MARKER).is_file() else None


def carries_vector(model: "nn.Module") -> bool:
    """Whether the model says that its weights hold a vector."""
    return _entry(model) is not None


def _entry(model: "nn.Module") -> Any:
    from ..models.parameters import base_model

    return getattr(base_model(model).config, CONFIG_KEY, None)


def check_not_safeguarded(name_or_path: str, revision: str | None = None) -> None:
    """Raises `ConfigError` for a checkpoint or adapter that a safety step has written."""
    if stored_file(name_or_path, revision, MARKER) is None and not holds_vector(
        name_or_path, revision
    ):
        return
    raise ConfigError(
        f"{name_or_path} is a safeguarded checkpoint already: name the fine-tune that it was made from, or fine-tune it first."
    )


def reported_coefficients(given: str, vector: SafetyVector) -> Coefficients:
    """The coefficients in the report of an earlier safety step with this vector: a file, or the
    folder it lies in.

    Raises:
        ConfigError: There is no such report, or it is about another vector.
    """
    return _report_about(given, vector).coefficients


def _report_about(given: str, vector: SafetyVector) -> _Reported:
    path = _report_path(given)
    found = _report_content(path)
    if found.vector != vector_id(vector):
        raise ConfigError(
            f"{path} is about another safety vector: coefficients mean nothing beside another vector."
        )
    return found


def is_touched_up(given: str) -> bool:
    """Whether a release, by its report, is one that its coefficients alone do not make.

    Raises:
        ConfigError: There is no such report, or it is damaged.
    """
    return _report_content(_report_path(given)).is_touched_up


def check_coefficients_are_all(given: str) -> None:
    """Raises `ConfigError` for the report of a release that its coefficients alone do not make."""
    if is_touched_up(given):
        raise ConfigError(
            f"{_report_path(given)} is of a release with a touch-up, which its coefficients alone do not make: leave out `coefficients` and name "
            "it as `search.warm_start`, with `search.repair: vector+touch-up` if a touch-up is to be learned again."
        )


def _report_path(given: str) -> Path:
    return Path(given) / MARKER if Path(given).is_dir() else Path(given)


def _report_content(path: Path) -> _Reported:
    """What a report says of the weights of its release.

    Raises:
        ConfigError: It is none, or a coefficient is no finite number from 0 to the largest that
            there can be.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = dict(report["coefficients"].items())
        weights = report["vector"]["files"].get(WEIGHTS_FILE, {}).get("sha256")
        touched_up = report.get("repair", {"rung": "vector"})["rung"] != "vector"
        touch_ups = list(report.get("base", {}).get("touch_ups", []))
        if touched_up:
            learned = report["repair"]["touch_up"]
            touch_ups.append({key: learned[key] for key in ("rank", "sha256")})
    except OSError as error:
        raise ConfigError(
            f"{path} is no readable report of a safety step: name a {MARKER} or its folder."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no report of a safety step: name a {MARKER} or its folder."
        ) from error
    for name, value in found.items():
        if not _is_coefficient(value):
            raise ConfigError(
                f"The coefficient of `{name}` in {path} is {value!r}: it must be a number from 0 to {LARGEST_COEFFICIENT:g}; name "
                "another report."
            )
    return _Reported(weights, canonical(found), touch_ups, touched_up)
