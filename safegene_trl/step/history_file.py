"""What lies in and beside a history's file: lines, each checked for its shape, and a seal that
holds the last one.

The hash of the line before, which every line holds, shows a change anywhere but at the end. The end
is held by the *seal*, a file beside the history with the number of lines, their bytes and the last
line's hash. A release is added in this order: line, then seal. So a crash in between leaves a line
behind the seal, which the next release takes in; fewer lines than the seal says are never a crash.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config.metrics import differences
from ..config.validation import LARGEST_COUNT
from ..errors import SafeGeneError
from ..text import read_json
from .decision import EXIT_CODES


Release = dict[str, Any]
_BLOCK = 2**16  # bytes that the last line is looked for in at once
_LOSSES = ("safety", "benign", "utility")
_SHARE = ("share", "low", "high", "count")


@dataclass(frozen=True)
class Seal:
    """How far a history is known: its releases, their size in bytes, and the SHA-256 of the last
    line, None where there is none.
    """

    releases: int = 0
    size: int = 0
    last: str | None = None

    def after(self, line: bytes) -> "Seal":
        """The seal with one line more, which ends in a newline in the file."""
        return Seal(self.releases + 1, self.size + len(line) + 1, hashlib.sha256(line).hexdigest())

    def closes(self, line: bytes | None) -> bool:
        """Whether this is the last line it was made for; None for no line."""
        return self.last == (None if line is None else hashlib.sha256(line).hexdigest())


def seal_path(path: Path) -> Path:
    """Where a history's seal lies: beside the file itself, whatever links lead to it."""
    return path.resolve().with_name(f"{path.resolve().name}.seal")


def read_seal(path: Path) -> Seal | None:
    """The seal of the history at `path`, None where there is none.

    Raises:
        SafeGeneError: It cannot be read.
    """
    place = seal_path(path)
    try:
        seal = Seal(**read_json(place.read_bytes()))
        counts = all(type(count) is int and count >= 0 for count in (seal.releases, seal.size))
        if not counts or not _is_hash(seal.last) or (seal.releases == 0) != (seal.last is None):
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise SafeGeneError(
            f"The seal {place} of the history is damaged: restore it, or look the history through and seal it anew by "
            "`safegene history FILE --seal`."
        ) from error
    return seal


def write_seal(path: Path, seal: Seal) -> None:
    """Replaces the seal of a history that this process has locked; whenever it is read, it is the
    old one or the new one.
    """
    with prepared_seal(path, seal) as put:
        put()


@contextmanager
def prepared_seal(path: Path, seal: Seal) -> Iterator[Callable[[], None]]:
    """Writes the seal beside the history's; what is given puts it in its place, and after the block
    nothing else of it is left.
    """
    place = seal_path(path)
    # one name: what a crash leaves, the next release overwrites
    unfinished = place.with_name(f".{place.name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(json.dumps(asdict(seal)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        def put() -> None:
            unfinished.replace(place)

        yield put
    finally:
        with suppress(OSError):
            unfinished.unlink()


def not_as_sealed(path: Path) -> SafeGeneError:
    """The error for a history whose end is another than its seal says."""
    return SafeGeneError(
        f"The history {path} is not as it was sealed: its last lines were changed or taken out; restore the file, or, to begin a "
        f"new one, move it away together with {seal_path(path).name}."
    )


def last_line(file: io.FileIO, end: int) -> bytes | None:
    """The line that ends at byte `end`, without its newline; None at the beginning, b"" where no
    line ends there.
    """
    if end == 0:
        return None
    begin, found = end, b""
    while begin > 0 and b"\n" not in found[:-1]:
        begin = max(0, begin - _BLOCK)
        file.seek(begin)
        found = file.read(end - begin)
    return found[:-1].rpartition(b"\n")[2] if found.endswith(b"\n") else b""


def parse_release(line: bytes, where: str) -> Release:
    """A line as the release it stands for, every field of the type it must have; a field that is
    not known may be anything.

    Args:
        line: JSON, without its newline.
        where: Names the line in an error.

    Raises:
        SafeGeneError: It is no JSON, or a field is missing or of another type; NaN, infinity and
            what is larger than a float can be are no numbers.
    """
    try:
        release = read_json(line)
    except (ValueError, RecursionError) as error:
        raise SafeGeneError(f"{where} is damaged: restore the file.") from error
    if not isinstance(release, dict):
        raise SafeGeneError(f"{where} holds no release: restore the file.")
    for name, fits in _FIELDS.items():
        if name not in release or not fits(release[name]):
            raise SafeGeneError(
                f"`{name}` in {where[0].lower()}{where[1:]} is not as it must be: restore the file."
            )
    for metric in differences():  # older releases lack some
        if metric.key in release and not _is_share_or_none(release[metric.key]):
            raise SafeGeneError(
                f"`{metric.key}` in {where[0].lower()}{where[1:]} is not as it must be: restore the file."
            )
    return release


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_time(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_hash(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) == 64)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _holds(value: Any, names: tuple[str, ...]) -> bool:
    """Whether it is a mapping with a number for each name."""
    return isinstance(value, dict) and all(_is_number(value.get(name)) for name in names)


def _is_share(value: Any) -> bool:
    return (
        _holds(value, _SHARE)
        and type(value["count"]) is int
        and 0 < value["count"] <= LARGEST_COUNT
    )


def _is_share_or_none(value: Any) -> bool:
    return value is None or _is_share(value)


def _is_rate(value: Any) -> bool:
    """A share that was counted."""
    return (
        _is_share(value)
        and type(value.get("successes")) is int
        and 0 <= value["successes"] <= value["count"]
    )


def _are_rates(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("categories", {}), dict):
        return False
    rates = [rate for name, rate in value.items() if name != "categories"]
    return all(map(_is_rate, [*rates, *value.get("categories", {}).values()]))


def _are_held_out(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(_holds(value.get(s), _LOSSES) for s in ("before", "after"))
    )


def _are_coefficients(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_number(number) and number >= 0 for number in value.values()
    )


def _is_vector(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("name")) and _is_hash(value.get("sha256"))


def _is_base(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_is_text_or_none(value.get(name)) for name in ("name", "revision"))
        and _is_hash(value.get("sha256"))
        and isinstance(value.get("carries_vector"), bool)
    )


_FIELDS = {
    "time": _is_time,
    "output": _is_text,
    "outcome": lambda value: isinstance(value, str) and value in EXIT_CODES,
    "reason": _is_text,
    "vector": _is_vector,
    "base": _is_base,
    "coefficients": _are_coefficients,
    "held_out": _are_held_out,
    "before": _are_rates,
    "after": _are_rates,
    "utility_loss": _is_share_or_none,
    "report": lambda value: isinstance(value, str) and len(value) == 64,
    "previous": _is_hash,
}
