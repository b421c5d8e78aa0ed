"""How a finished folder takes the place of an earlier one, and what a run that was killed leaves
beside it.

A folder is written under a temporary name beside its target: `_safegene.TOKEN.new.NAME`, with a
token of eight hex digits. All before NAME has one length, so no two targets share a temporary name.
The leading `_` keeps `Trainer.push_to_hub`, which leaves out `_*`, from uploading it. Then the two
folders are exchanged in one operation, so that a reader finds a whole folder at any moment. Where
the kernel or the file system has no such operation, the earlier one is moved aside to
`_safegene.TOKEN.old.NAME` first; a run that is killed at this point has it put back by the next.

A temporary folder is locked (flock) by the process that writes it, which tells it from one whose
process was killed. Temporary folders are made and looked for under a lock of the folder they lie
in.
"""

import ctypes
import errno
import fcntl
import functools
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..interruption import undisturbed
from .contents import FolderKind, check_replaceable, foreign_file


logger = logging.getLogger(__name__)
NEW, OLD = "new", "old"
LONGEST_WAIT = 30.0  # seconds for a lock that is held for milliseconds
_NAME = re.compile(r"_safegene\.[0-9a-f]{8}\.(?P<state>new|old)\.(?P<name>.+)", re.DOTALL)
# up to version 0.1
_EARLIER_NAME = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<state>tmp|old)", re.DOTALL)
_AT_CWD, _EXCHANGE = -100, 2
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT}


def temporary_name(target: Path, state: str = NEW) -> Path:
    """A sibling of `target` that nothing else has."""
    return target.with_name(f"_safegene.{secrets.token_hex(4)}.{state}.{target.name}")


def parse_temporary_name(name: str) -> tuple[str, str] | None:
    """The target's name and the state, `new` or `old`; None for a name that is not temporary."""
    if found := _NAME.fullmatch(name) or _EARLIER_NAME.fullmatch(name):
        return found["name"], OLD if found["state"] == OLD else NEW
    return None


def leftovers(target: Path, state: str = NEW, folders: bool = True) -> list[Path]:
    """The temporary folders, or files, of `target`, the newest first."""
    found = []
    with suppress(OSError):  # a folder that cannot be listed, or is not there
        for path in target.parent.iterdir():
            with suppress(FileNotFoundError):
                if parse_temporary_name(path.name) == (target.name, state):
                    status = path.lstat()
                    if (stat.S_ISDIR if folders else stat.S_ISREG)(status.st_mode):
                        found.append((status.st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def moved_aside(target: Path, kind: FolderKind) -> Path | None:
    """The earlier folder of a target that is missing, where a run was killed as it replaced it."""
    if os.path.lexists(target):
        return None
    return next((path for path in leftovers(target, OLD) if (path / kind.marker).is_file()), None)


def restore(target: Path, kind: FolderKind) -> bool:
    """Puts back an earlier folder that a killed run had moved aside; whether there was one."""
    if moved_aside(target, kind) is None:
        return False
    with locked(target.parent, LONGEST_WAIT):
        if earlier := moved_aside(target, kind):  # not before the lock: it may have been on its way
            earlier.rename(target)
            sync(target.parent)
            logger.warning(
                "%s had been moved aside by a run that was interrupted: it is back.", target
            )
        return earlier is not None


@contextmanager
def temporary_folder(target: Path, clear: FolderKind | None = None) -> Iterator[Path]:
    """Makes a temporary folder beside `target`, and the folders above it that are missing; all are
    removed in the end.

    Args:
        target: The place to be.
        clear: Kind of the folder at `target`; given, what killed runs have left beside it is
            removed.
    """
    undo = ExitStack()
    try:
        folder = _made(target, undo)
        if clear is not None:
            for path in _abandoned(target, clear):
                remove(path)
        yield folder
    finally:
        with undisturbed(later=True):
            undo.close()


def _made(target: Path, undo: ExitStack) -> Path:
    """The folder, locked. What takes it away is in `undo` before it is there: a signal may come at
    any moment.
    """
    for _ in range(100):
        _make_missing(target.parent, undo)
        folder = temporary_name(target)
        undo.callback(remove, folder)
        # another run may take an empty parent away again, which it had made
        with suppress(FileNotFoundError), locked(target.parent, LONGEST_WAIT):
            folder.mkdir()
            descriptor = os.open(folder, os.O_RDONLY)
            undo.callback(os.close, descriptor)
            with suppress(OSError):  # file systems without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target.parent))


def _make_missing(folder: Path, undo: ExitStack) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        made = [path]
        undo.callback(_remove_empty, made)
        try:
            path.mkdir()
        except (FileExistsError, FileNotFoundError):  # another run's
            made.clear()
        else:
            sync(path.parent)
    if missing and folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _remove_empty(made: list[Path]) -> None:
    for folder in made:
        with suppress(OSError):  # it is not empty any more
            folder.rmdir()


def _abandoned(target: Path, kind: FolderKind) -> list[Path]:
    """What may be removed of the temporary folders of killed runs, under names that nobody takes
    for an earlier folder.
    """
    found = []
    with locked(target.parent, LONGEST_WAIT) as alone:
        if not alone:
            return []
        for path in leftovers(target, OLD) if os.path.lexists(target) else ():
            with suppress(OSError):
                if foreign_file(path, kind) is None:
                    path.rename(temporary_name(target))
        for path in leftovers(target, NEW):
            with suppress(OSError), locked(path) as free:
                # an earlier one that was exchanged is whole, and may have been given further files
                if free and not ((path / kind.marker).is_file() and foreign_file(path, kind)):
                    found.append(path)
    return found


def install(folder: Path, target: Path, kind: FolderKind) -> None:
    """Puts a finished folder at `target`; an earlier one of the kind goes, or stays if anything
    fails.

    Raises:
        OutputError: What lies at `target` holds files of others.
    """
    with locked(target.parent, LONGEST_WAIT):
        for attempt in range(100):
            try:
                earlier = _placed(folder, target, kind)
                break
            except OSError as error:  # another process was faster, on a file system without locks
                if error.errno not in _TAKEN or not folder.is_dir() or attempt == 99:
                    raise
        sync(target.parent)
    if earlier is not None:
        remove(earlier)


def _placed(folder: Path, target: Path, kind: FolderKind) -> Path | None:
    """Where the earlier folder is now, None where there was none."""
    if not os.path.lexists(target):
        folder.rename(target)
        return None
    check_replaceable(target, kind)
    if exchange(folder, target):
        try:
            check_replaceable(folder, kind, target)  # it may have been given a file since
        except BaseException:
            exchange(folder, target)
            raise
        return folder
    aside = temporary_name(target, OLD)
    target.rename(aside)
    try:
        check_replaceable(aside, kind, target)
        folder.rename(target)
    except BaseException:
        if not os.path.lexists(target):
            aside.rename(target)
        raise
    # what is half removed must never be taken for a folder that was moved aside
    doomed = temporary_name(target)
    aside.rename(doomed)
    return doomed


def exchange(one: Path, other: Path) -> bool:
    """Lets two paths change places in one operation; False where kernel or file system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False  # where nothing may be renamed at all, the next attempt says so
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@functools.cache
def _renameat2() -> Any:
    """Linux's, None elsewhere."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    )
    return function


def remove(folder: Path) -> None:
    """Removes a temporary folder; one that another run removes as well, or that cannot be removed,
    fails nothing.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        logger.warning("%s is left over and cannot be removed.", folder)


@contextmanager
def locked(folder: Path, wait: float = 0.0) -> Iterator[bool]:
    """Holds a lock on a folder that ends with the process.

    Gives False where another has it for longer than `wait` seconds, or the file system has no
    locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor, time.monotonic() + wait)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, until: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.005)
        except OSError:
            return False


def sync(path: Path) -> None:
    """Flushes a file, or what a folder lists, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # file systems that flush files only
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
