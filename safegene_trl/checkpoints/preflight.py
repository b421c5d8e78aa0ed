"""Whether results can be written, found out by doing what will be done at the end and undoing it."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError
from .contents import ADAPTER_CONFIG, CHECKPOINT, FolderKind, check_replaceable
from .places import LONGEST_SUFFIX
from .renaming import (
    moved_aside,
    parse_temporary_name,
    restore,
    sync,
    temporary_folder,
    temporary_name,
)


_LONGEST_FILE_NAME = 64  # of the files in a folder of ours
# what a folder of a model, adapter or safety vector has
_RECORDS = ("config.json", ADAPTER_CONFIG, "safegene_config.json")


def check_output(
    target: Path, needed_bytes: int = 0, kind: FolderKind = CHECKPOINT, restore_earlier: bool = True
) -> None:
    """Raises `OutputError` unless a folder can be put at `target` without losing what others wrote
    there.

    Makes a temporary folder beside it, writes to it, renames it, and tries whether an earlier
    folder may be renamed. Nothing of that is left. An earlier folder that a killed run had moved
    aside is put back first.

    Args:
        target: The folder to be. An earlier one of the same kind may be replaced.
        needed_bytes: Its size.
        kind: What it will be.
        restore_earlier: Whether an earlier folder may be put back; a dry run only says that it
            would be.
    """
    check_name(target)
    with _as_output_error(f"{target} cannot be written"):
        earlier = moved_aside(target, kind)
        if earlier is not None and (not restore_earlier or not restore(target, kind)):
            check_replaceable(earlier, kind, target)
        _check_free_to_use(target, kind)
        parent = nearest_folder(target.parent)
    with _as_output_error(f"{parent} is not writable"):
        free = shutil.disk_usage(parent).free
        if free < needed_bytes:
            raise OutputError(
                f"{parent} has {free / 2**30:.1f} GiB free and the checkpoint needs {needed_bytes / 2**30:.1f} GiB: free some "
                "space or choose another `output_dir`."
            )
        with temporary_folder(target) as folder:
            _try_to_write(folder / ("x" * _LONGEST_FILE_NAME))
            second = temporary_name(target)
            folder.rename(second)
            try:
                if os.path.lexists(target):
                    _try_to_move(target, second)
            finally:
                second.rename(folder)
            sync(target.parent)


def check_name(target: Path) -> None:
    """Raises `OutputError` for what can be no new folder's name: `.`, `..`, nothing, a temporary
    one, or one too long.
    """
    if target.name in ("", "..") or "\0" in str(target):
        raise OutputError(
            f"`{str(target)!r}` cannot be made as a folder: choose another `output_dir`."
        )
    try:
        length = len(os.fsencode(target.name)) + LONGEST_SUFFIX
        longest = os.pathconf(nearest_folder(target.parent), "PC_NAME_MAX")
    except UnicodeError as error:
        raise OutputError(f"{target!r} is no valid name: choose another `output_dir`.") from error
    except OSError:
        longest = 255
    if length > longest:
        raise OutputError(
            f"The name {target.name} is too long for its reports: choose an `output_dir` of at most {longest - LONGEST_SUFFIX} bytes."
        )
    if parse_temporary_name(target.name):
        raise OutputError(
            f"{target.name} is a name of unfinished folders: choose another `output_dir`."
        )


def _check_free_to_use(target: Path, kind: FolderKind) -> None:
    if not os.path.lexists(target):
        return
    check_replaceable(target, kind)
    with suppress(FileNotFoundError):  # another run is just replacing it
        here = Path.cwd()
        if any(os.path.samefile(target, folder) for folder in (here, *here.parents)):
            raise OutputError(
                f"{target} is or holds the current folder: go elsewhere or choose another `output_dir`."
            )
    for folder, _, _ in os.walk(target):
        if not os.access(folder, os.W_OK | os.X_OK) and os.path.isdir(folder):
            raise OutputError(
                f"{folder} is not writable and cannot be replaced: choose another `output_dir`."
            )


def _try_to_write(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"0" * 2**16)
        file.flush()
        os.fsync(file.fileno())


def _try_to_move(target: Path, occupied: Path) -> None:
    """Renames `target` to a folder that holds a file: the one renaming that is checked in full and
    then refused.

    The kernel first sees whether `target` may be moved: permissions, a sticky parent, mount points,
    layers of a container. If it were moved all the same, it would be moved back.
    """
    try:
        os.rename(target, occupied)
    except FileNotFoundError:  # another run is just replacing it
        return
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        raise OutputError(
            f"{target} cannot be replaced ({error.strerror}), e.g. because it is a mount point or belongs to another user: choose a "
            "folder inside it or another `output_dir`."
        ) from error
    os.rename(occupied, target)
    raise OutputError(
        f"{target} is on a file system that renames over files: choose another `output_dir`."
    )


def check_writable(path: Path) -> None:
    """Raises `OutputError` unless lines can be added to a file at `path`, and it can be locked. It
    is neither made nor changed.
    """
    if "\0" in str(path) or path.name in ("", ".."):
        raise OutputError(f"`{str(path)!r}` cannot be made as a file: choose another place.")
    with _as_output_error(f"{path} cannot be written", "choose another place"):
        place = Path(os.path.realpath(path))
        if len(os.fsencode(place.name)) > os.pathconf(nearest_folder(place.parent), "PC_NAME_MAX"):
            raise OutputError(f"The name {place.name} is too long: choose another place.")
        if os.path.lexists(place):
            return _try_to_append(place)
        # the file itself could be in use by another run before it could be removed again
        with temporary_folder(
            place.with_name("x"), clear=CHECKPOINT
        ) as folder:  # what a killed trial left goes, too
            file = folder / "x"
            file.touch()
            _try_to_append(file)
            _try_to_write(file)


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path] = ()) -> None:
    """`check_writable` for every file that a command is to write, before it writes the first.

    Raises:
        OutputError: One cannot be written, is named twice, is one of the files that are read, or
            is there and belongs to a model, adapter or safety vector.
    """
    taken = {os.path.realpath(path): "is read" for path in inputs}
    for path in outputs:
        if path is None:
            continue
        check_writable(path)
        place = os.path.realpath(path)
        if place in taken:
            raise OutputError(f"{path} {taken[place]} by the same command: choose another place.")
        taken[place] = "is written already"
        if os.path.lexists(place) and any((Path(place).parent / own).exists() for own in _RECORDS):
            raise OutputError(
                f"{path} is a file of a model or safety vector: choose another place."
            )


def _try_to_append(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OutputError(f"{path} is no plain file: choose another place.")
        with suppress(BlockingIOError):  # another run is just adding a line
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


@contextmanager
def _as_output_error(what: str, remedy: str = "choose another `output_dir`") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"{what} ({reason}): {remedy}.") from error


def nearest_folder(path: Path) -> Path:
    """The first folder at or above `path` that exists: on its disk the path would be written."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())
