"""Files of JSON lines that are added to while a run goes on: a line that a crash cut off is
dropped, any other damage is an error.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.write_errors import writing
from ..errors import OutputError
from ..text import strict_json


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a file, none where there is no file. A last line without its end that is no
    JSON is left out.

    Raises:
        OutputError: The file cannot be read, or a line is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}.") from error
    rows = [
        _object(line, path, number)
        for number, line in enumerate(lines[:-1], start=1)
        if line.strip()
    ]
    if (last := _parsed(lines[-1])) is not None:
        rows.append(last)
    return rows


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds objects, each in a line of its own; what a crash has left of an earlier line is taken
    out first.

    Raises:
        OutputError: The file cannot be written.
    """
    text = "".join(strict_json(row, indent=None) + "\n" for row in rows)
    with writing(), open(path, "a+b") as file:
        _repair(file)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _repair(file: Any) -> None:
    """Ends a last line that has no end, or takes it out where it is no JSON."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    whole, _, last = file.read().rpartition(b"\n")
    if _parsed(last) is None:
        file.truncate(len(whole) + 1 if whole else 0)
    else:
        file.write(b"\n")


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    found = _parsed(line)
    if found is None:
        raise OutputError(
            f"Line {number} of {path} is damaged: take it out, and what it held is done again."
        )
    return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
