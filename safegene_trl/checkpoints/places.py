"""How the places of results and inputs lie to each other: nothing that is read may be replaced,
removed or written into.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import OutputError
from .renaming import parse_temporary_name


# What a run that fails puts beside its target, and the next one that succeeds removes.
FAILURE_SUFFIXES = (
    ".failed.json",
    ".failed.html",
    ".failed.coefficients.png",
    ".failed.history.png",
)
LONGEST_SUFFIX = max(map(len, FAILURE_SUFFIXES))

_Place = tuple[tuple[int, int], tuple[str, ...]]


Input = Path | str | None


def check_places(
    target: Path, inputs: Mapping[str, Input | Sequence[Input]], inside_ok: Collection[str] = ()
) -> None:
    """Raises `OutputError` if writing the folder `target` would touch an input, through links,
    other spelling or mounts as well.

    Args:
        target: The folder to be; it replaces what is there.
        inputs: All that is read or kept, by what it is (`the safety vector`). A text that is no
            file or folder here is a hub id and left out; a `Path` counts whether it is there or
            not. Several of one sort are given as a list.
        inside_ok: Those that the target may lie inside of, e.g. the trainer's `output_dir`.
    """
    if "\0" in str(target):
        raise OutputError(f"{str(target)!r} is no valid name: choose another `output_dir`.")
    for what, given in inputs.items():
        for one in [given] if given is None or isinstance(given, str | Path) else given:
            if isinstance(one, Path) or (one and os.path.exists(one)):
                _check_place(target, what, Path(one), what in inside_ok)


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths name one file or folder, which may not be there yet: through links, other
    spelling or mounts as well.
    """
    return _places(one)[0] == _places(other)[0]


def _check_place(target: Path, what: str, path: Path, inside_ok: bool) -> None:
    here, there = _places(target), _places(path)
    if there[0] == here[0]:
        raise OutputError(f"{target} is {what} {path} itself: choose another `output_dir`.")
    if here[0] in there:
        raise OutputError(
            f"{target} holds {what} {path} and is replaced as a whole: move that away or choose another `output_dir`."
        )
    if there[0] in here and not inside_ok:
        raise OutputError(
            f"{target} lies inside {what} {path}: choose an `output_dir` outside of it."
        )
    if use := _endangered_beside(target, path):
        raise OutputError(
            f"{path}, {what}, has a name that is used for {use} of {target}: rename it or choose another `output_dir`."
        )


def _endangered_beside(target: Path, path: Path) -> str | None:
    for suffix in FAILURE_SUFFIXES:
        if _places(target.with_name(target.name + suffix))[0] in _places(path):
            return "reports of failures"
    real, parent = Path(os.path.realpath(path)), _places(target)[1]
    for one in (real, *real.parents):
        parsed = parse_temporary_name(one.name)
        if parsed and parsed[0] == target.name and _place(one.parent) == parent:
            return "unfinished folders"
    return None


def _places(path: Path) -> list[_Place]:
    """A path and all folders above it, so that equal ones are the same place.

    A place is the identity of its nearest folder or file that exists, and the names below that.
    """
    real = Path(os.path.realpath(path))
    return [_place(one) for one in (real, *real.parents)]


def _place(real: Path) -> _Place:
    names: list[str] = []
    for path in (real, *real.parents):
        try:
            status = path.stat()
        except OSError:
            names.insert(0, path.name)
            continue
        folded = map(str.casefold, names) if names and _ignores_case(path) else names
        return (status.st_dev, status.st_ino), tuple(folded)
    return (0, 0), tuple(names)


def _ignores_case(folder: Path) -> bool:
    """Whether the file system takes `OUT` and `out` for one name, as far as the folder's own names
    tell.
    """
    for path in _with_letters(folder):
        try:
            return os.path.samefile(path, path.with_name(path.name.swapcase()))
        except OSError:
            return False
    return False


def _with_letters(folder: Path) -> Iterator[Path]:
    return (path for path in (folder, *folder.parents) if path.name.swapcase() != path.name)


def failure_path(target: Path) -> Path:
    """Where the report of a failed safety step goes: beside the folder that was not written."""
    return target.with_name(target.name + FAILURE_SUFFIXES[0])
