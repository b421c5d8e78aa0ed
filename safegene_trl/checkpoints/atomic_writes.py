"""Folders and files that appear whole or not at all."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from .contents import CHECKPOINT, FolderKind, check_replaceable
from .preflight import check_name
from .renaming import (
    LONGEST_WAIT,
    install,
    leftovers,
    locked,
    restore,
    sync,
    temporary_folder,
    temporary_name,
)
from .write_errors import writing


if TYPE_CHECKING:
    from ..distributed.communicator import Communicator


@contextmanager
def atomic_directory(
    target: Path, kind: FolderKind = CHECKPOINT, job: "Communicator | None" = None
) -> Iterator[Path]:
    """Gives a temporary sibling of `target` to write in, and puts it at `target` when the block
    ends well.

    An earlier folder of ours at `target` is there until its successor takes its place in one
    operation. After a failure nothing of the new one is left; a failure to write, e.g. a full disk,
    becomes an `OutputError`. What a run that was killed has left beside `target` is cleared away,
    and an earlier folder that it had moved aside is put back. Collective where a `job` is given:
    the folder exists on rank 0 only, and takes its place only after all ranks have come to the end.
    """
    together, is_main = (nullcontext, True) if job is None else (job.raising_together, job.is_main)
    folder = target
    with ExitStack() as held:
        with together(), writing():
            if is_main:
                check_name(target)
                restore(target, kind)
                check_replaceable(target, kind)
                folder = held.enter_context(temporary_folder(target, clear=kind))
        with writing():
            yield folder
        with together(), writing():
            if is_main:
                _finish(folder)
        with together(), writing():
            if is_main:
                install(folder, target, kind)


def replace_file(path: Path, text: str) -> None:
    """Writes a text file that is, whenever it is read, the old one or the new one; also after a
    loss of power.
    """
    with writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent, LONGEST_WAIT) as alone:
            for left in leftovers(path, folders=False) if alone else ():  # of runs that were killed
                left.unlink(missing_ok=True)
            unfinished = temporary_name(path)
            try:
                unfinished.write_text(text, encoding="utf-8")
                sync(unfinished)
                unfinished.replace(path)
                sync(path.parent)
            finally:
                unfinished.unlink(missing_ok=True)


def check_new(folder: Path, names: Iterable[str]) -> None:
    """Raises `OutputError` for the first of these names that something has in a folder, be it a link
    that leads nowhere.
    """
    for path in (folder / name for name in names):
        if os.path.lexists(path):
            raise _there_already(path)


def write_new_files(folder: Path, files: Mapping[str, str]) -> None:
    """Writes text files, all of them or none, and never over what is there. The folder is made where
    it is missing.

    Args:
        folder: Where they go.
        files: Their texts by name.

    Raises:
        OutputError: One is there already, or nothing can be written.
    """
    check_new(folder, files)
    written: list[Path] = []
    with writing():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, text in files.items():
                path = folder / name
                try:
                    # nobody else's file or link: this call makes one or fails
                    with open(path, "x", encoding="utf-8") as file:
                        written.append(path)
                        file.write(text)
                except FileExistsError as error:
                    raise _there_already(path) from error
                sync(path)
            sync(folder)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise


def _there_already(path: Path) -> OutputError:
    return OutputError(
        f"{path} is there already and is not replaced: move it away, or choose another `--output_dir`."
    )


def _finish(folder: Path) -> None:
    """Flushes all files to disk, each as readable as the folder is: safetensors makes them for
    their owner alone.
    """
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(PermissionError):  # file systems without modes
                path.chmod(readable)
        sync(path)
    sync(folder)
