"""The releases of one model line: an append-only file of JSON lines, each holding the hash of the
line before it, and its seal.
"""

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..config.metrics import differences
from ..errors import OutputError, SafeGeneError
from ..provenance import sha256_of_json, weight_hashes
from ..vectors.files import WEIGHTS_FILE
from .history_file import (
    Release,
    Seal,
    last_line,
    not_as_sealed,
    parse_release,
    prepared_seal,
    read_seal,
    seal_path,
    write_seal,
)


def release_of(report: dict[str, Any], output: Path) -> Release:
    """What the history keeps of a report."""
    base = report["base"]
    weights = weight_hashes(base)
    measured = report.get("measured", {})
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "output": str(output),
        "outcome": report["decision"]["outcome"],
        "reason": report["decision"]["reason"],
        "vector": {
            "name": report["vector"]["name"],
            "sha256": report["vector"]["files"].get(WEIGHTS_FILE, {}).get("sha256"),
        },
        "base": {
            "name": base["name"],
            "revision": base["revision"],
            "sha256": sha256_of_json(weights) if weights else None,
            "carries_vector": base["carries_vector"],
        },
        "coefficients": report["coefficients"],
        "held_out": report.get("held_out"),
        "before": measured.get("before"),
        "after": measured.get("after"),
        "utility_loss": measured.get("utility_loss"),
        **{metric.key: measured[metric.key] for metric in differences() if metric.key in measured},
        **({"repair": report["repair"]["rung"]} if "repair" in report else {}),
        "report": sha256_of_json(report),
    }


def append_release(path: Path, release: Release) -> None:
    """Adds a release, chained to the one before, and seals the file. Runs of one line may end at
    the same time.

    Raises:
        OutputError: The file cannot be written.
        SafeGeneError: It is not the file that was sealed.
    """
    with prepared_release(path, release) as add:
        add()


@contextmanager
def prepared_release(path: Path, release: Release) -> Iterator[Callable[[], None]]:
    """All of `append_release` that needs space on the disk; what is given adds the release, by one
    byte and one renaming.

    The line is written as one that a crash has cut off, which no reader takes for a release: a
    space stands where its newline goes. Until the block ends the history is locked for others. A
    release that was not added by then is taken out again. Reads the seal and what lies behind it,
    never the whole file.

    Raises:
        OutputError: The file cannot be written.
        SafeGeneError: It is not the file that was sealed.
    """
    with ExitStack() as held:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # not to append, as the line's last byte is written over; no buffer, which would be
            # written once more at the end
            file = held.enter_context(
                open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            )
            fcntl.flock(file, fcntl.LOCK_EX)
            seal = _caught_up(file, path)
            # before the line, so that a line with a number always has a seal
            if read_seal(path) != seal:
                write_seal(path, seal)
            line = release | {"sequence": seal.releases + 1, "previous": seal.last}
            content = json.dumps(line, ensure_ascii=False).encode()
            # what cannot be read again is not to be written
            parse_release(content, "The new release's line")
            held.callback(_take_out_torn, file, seal.size)
            _write_at(file, seal.size, content + b" ")
            place_seal = held.enter_context(prepared_seal(path, seal.after(content)))

        def add() -> None:
            with _writing(path):
                _write_at(file, seal.size + len(content), b"\n")
                place_seal()

        yield add


def _write_at(file: io.FileIO, position: int, content: bytes) -> None:
    """Writes all of the content there, and to the disk."""
    file.seek(position)
    while content:
        content = content[file.write(content) :]
    os.fsync(file.fileno())


def _take_out_torn(file: io.FileIO, size: int) -> None:
    """Cuts a locked history back to `size` bytes where its last line has no newline."""
    with suppress(OSError):  # the next release takes it out
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.truncate(size)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns a failure to write the history into an `OutputError` that names it."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"The history {path} cannot be written ({error.strerror or error}): free space there, or name another `output.history`."
        ) from error


def _caught_up(file: io.FileIO, path: Path) -> Seal:
    """The seal of the whole lines of an open history; a line that a crash cut off is taken out."""
    seal = read_seal(path) or Seal()
    size = file.seek(0, os.SEEK_END)
    if size < seal.size or not seal.closes(last_line(file, seal.size)):
        raise not_as_sealed(path)
    file.seek(seal.size)
    *lines, torn = file.read().split(b"\n")
    for _, line in _chained(lines, path, seal):
        seal = seal.after(line)
    if torn:
        file.truncate(seal.size)
    return seal


def read_history(path: Path) -> list[Release]:
    """All releases, the oldest first; none where there is no file. A last line that a crash cut off
    is not one.

    Raises:
        SafeGeneError: It cannot be read, a line was changed, put in or taken out, or is none of a
            history.
    """
    seal = read_seal(path)  # before the lines: a run that ends in between adds to them
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise SafeGeneError(f"The history {path} cannot be read: {error.strerror}.") from error
    releases: list[Release] = []
    at = Seal()
    for release, line in _chained(lines, path, at):
        releases.append(release)
        at = at.after(line)
        if seal is not None and at.releases == seal.releases and at != seal:
            raise not_as_sealed(path)
    if seal is not None and at.releases < seal.releases:
        raise not_as_sealed(path)
    if seal is None and any("sequence" in release for release in releases):
        raise SafeGeneError(
            f"The history {path} was sealed and its seal {seal_path(path)} is gone: put it back, or look the file through and "
            "seal it anew by `safegene history FILE --seal`."
        )
    return releases


def _chained(lines: Sequence[bytes], path: Path, seal: Seal) -> Iterator[tuple[Release, bytes]]:
    """The releases in lines that follow a seal, and their bytes."""
    number, previous = seal.releases, seal.last
    for line in lines:
        number += 1
        release = parse_release(line, f"Line {number} of the history {path}")
        if release["previous"] != previous or release.get("sequence", number) != number:
            raise SafeGeneError(
                f"Line {number} of the history {path} does not follow from the line before: one was changed or taken out; "
                "restore the file."
            )
        yield release, line
        previous = hashlib.sha256(line).hexdigest()


def history_warnings(path: Path) -> list[str]:
    """Whether a history has no seal yet, as those that were written before there were any."""
    if not path.exists() or path.stat().st_size == 0 or read_seal(path) is not None:
        return []
    return [
        f"The history {path} has no seal yet, so that a last line that was changed or taken out is not noticed: the next release "
        "seals it."
    ]


def seal_history(path: Path) -> int:
    """Seals a history as it is, whatever its seal says; for a person who has looked it through.

    Returns:
        How many releases it holds.

    Raises:
        SafeGeneError: It is no history, or its lines do not follow from each other.
    """
    with _writing(path), open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        seal = Seal()
        for _, line in _chained(file.read().split(b"\n")[:-1], path, seal):
            seal = seal.after(line)
        write_seal(path, seal)
    return seal.releases


def last_accepted(releases: Sequence[Release]) -> Release | None:
    """The newest release that was not rejected."""
    return next(
        (release for release in reversed(releases) if release["outcome"] != "rejected"), None
    )


def base_warnings(releases: Sequence[Release], base: dict[str, Any]) -> list[str]:
    """Whether a fine-tune started from another base than the last release, as it is in a report; a
    re-based one is none.
    """
    weights = weight_hashes(base)
    if not weights or base["carries_vector"]:
        return []
    bases = [
        r["base"]
        for r in releases
        if r["outcome"] != "rejected" and not r["base"]["carries_vector"]
    ]
    if not bases or bases[-1]["sha256"] in (None, sha256_of_json(weights)):
        return []
    return [
        f"The base model is not that of the last release: {_named(base)} instead of {_named(bases[-1])}. Coefficients and numbers "
        "may not compare."
    ]


def _named(base: dict[str, Any]) -> str:
    return str(base["name"]) + (f" at {base['revision']}" if base["revision"] else "")
