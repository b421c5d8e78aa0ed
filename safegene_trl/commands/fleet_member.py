"""One fine-tune on its way through a fleet, and the file that says how far each has come."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.atomic_writes import replace_file
from ..checkpoints.contents import FLEET_WORKSHOP, MARKER
from ..checkpoints.places import failure_path
from ..checkpoints.source import adapter_base
from ..errors import ConfigError, SafeGeneError
from ..provenance import sha256_of_file, sha256_of_json
from ..step.decision import EXIT_CODES
from ..text import read_json, strict_json
from .fleet_file import Fleet, overlap, sources, target_of
from .yaml_files import as_yaml


FAILED, INTERRUPTED = "failed", "interrupted"


@dataclass
class Member:
    """One fine-tune on its way through the fleet.

    Attributes:
        memory: Bytes that its process will take, as estimated.
        key: Hash of all that its result depends on; a finished one with the same key is not done
            again.
        report: SHA-256 of the report of a finished one, which says whether what lies there is still
            that.
        outcome: One of the gate's, `failed`, or `interrupted`; empty before it was started.
        seconds: How long its process took, in whichever run that was.
        done_before: Whether that was an earlier run, whose result is still good.
    """

    name: str
    recipe: Path
    target: Path
    key: str
    memory: int = 0
    report: str = ""
    outcome: str = ""
    message: str = ""
    seconds: float = 0.0
    done_before: bool = False

    @property
    def log(self) -> Path:
        return self.recipe.with_suffix(".log")

    def finish(self, outcome: str, message: str) -> None:
        self.outcome, self.message = outcome, message


def member_of(fleet: Fleet, entry: dict[str, Any], before: Mapping[str, dict[str, Any]]) -> Member:
    name, recipe = fleet.name_of(entry), fleet.recipe(entry)
    file = Path(fleet.output_dir) / FLEET_WORKSHOP / f"{name}.yaml"
    replace_file(file, as_yaml(recipe))
    target = target_of(recipe)
    # what it reads from its own folder, e.g. for a warm start, changes with its result
    inputs = [
        _stamps(source, deep) for source, deep in _read(recipe) if not overlap(Path(source), target)
    ]
    member = Member(name, file, target, sha256_of_json([recipe, inputs]))
    earlier = before.get(name, {})
    if earlier.get("key") == member.key and earlier.get("outcome") in EXIT_CODES:
        place, _ = newest_report(target, earlier["outcome"])
        if place is not None and sha256_of_file(place) == earlier.get("report"):
            member.report, member.seconds, member.done_before = (
                earlier["report"],
                earlier["seconds"],
                True,
            )
            member.finish(earlier["outcome"], earlier["message"])
    return member


def _read(recipe: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What a recipe reads, the base model of a local adapter included, and whether folders below it
    are read as well: those of data are. Below a model's lie other checkpoints.
    """
    named = [(source, "." in key) for key, source in sources(recipe).items()]
    model = str(recipe["model_name_or_path"])
    with suppress(SafeGeneError):  # which its own process will tell
        base = adapter_base(model) if Path(model).is_dir() else None
        named += [(base, False)] if base else []
    return named


def _stamps(source: str, deep: bool) -> list[Any]:
    """What tells whether a file or folder was written to since; of a hub id its name."""
    place = Path(source)
    files = sorted(place.rglob("*") if deep else place.glob("*")) if place.is_dir() else [place]
    return [
        source,
        [
            [str(file.relative_to(place)), file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
            if file.is_file()
        ],
    ]


def newest_report(target: Path, outcome: str) -> tuple[Path | None, dict[str, Any]]:
    """The newest report of a member with that outcome, and where it stands; a rejected one may have
    written no checkpoint.
    """
    found = []
    for place in [target / MARKER, *([failure_path(target)] if outcome == "rejected" else [])]:
        with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
            report = read_json(place.read_text(encoding="utf-8"))
            if report["decision"]["outcome"] == outcome:
                found.append((place.stat().st_mtime_ns, place, report))
    return max(found, key=lambda entry: entry[0])[1:] if found else (None, {})


def read_state(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = read_json(path.read_text(encoding="utf-8"))
        for entry in entries:
            texts = [entry[key] for key in ("name", "key", "outcome", "message")]
            if not all(isinstance(text, str) for text in texts) or not math.isfinite(
                entry["seconds"]
            ):
                raise ValueError(entry)
        return {entry["name"]: entry for entry in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SafeGeneError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: remove it, and the fleet starts anew.") from error


def save_state(members: Sequence[Member], path: Path) -> None:
    replace_file(path, strict_json([state_of(each) for each in members], indent=1) + "\n")


def state_of(member: Member) -> dict[str, Any]:
    """A member as JSON values."""
    values = asdict(member).items()
    return {key: str(value) if isinstance(value, Path) else value for key, value in values}
