"""Where results go: folders that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from .errors import OutputError
from .sharding import Sharding


MARKER = "safegene_report.json"


def check_output(target: Path, needed_bytes: int = 0, marker: str = MARKER) -> None:
    """Raises `OutputError` unless a folder can be put at `target` without losing what others wrote there.

    A folder that holds the file `marker` is one of ours and may be replaced.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file: choose another `output_dir`.")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise OutputError(
            f"{target} holds files that SafeGene did not write: choose another `output_dir` or empty it."
        )
    parent = nearest_folder(target)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} is not writable: choose another `output_dir`.")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{parent} has {free / 2**30:.1f} GiB free and the checkpoint needs {needed_bytes / 2**30:.1f} GiB: free some "
            "space or choose another `output_dir`."
        )


def check_writable(path: Path) -> None:
    """Raises `OutputError` unless the file can be made or written to."""
    if not os.access(path if path.exists() else nearest_folder(path.parent), os.W_OK) or path.is_dir():
        raise OutputError(f"{path} cannot be written: choose another place.")


def nearest_folder(path: Path) -> Path:
    """The first folder at or above `path` that exists: on its disk the path would be written."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


@contextmanager
def atomic_directory(target: Path, marker: str = MARKER, sharding: Sharding | None = None) -> Iterator[Path]:
    """Gives a temporary sibling of `target` to write in, and renames it to `target` when the block ends well.

    An earlier folder of ours at `target` is kept until its successor is complete. After a failure nothing of the new
    one is left; a failure to write, e.g. a full disk, becomes an `OutputError`. Collective where a `sharding` is given:
    the folder exists on rank 0 only, and is renamed only after all ranks have come to the end.
    """
    sharding = sharding or Sharding(torch.device("cpu"))
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with sharding.agreed(), writing():
            if sharding.is_main:
                check_output(target, marker=marker)
                folder.mkdir(parents=True)
        with writing():
            yield folder
        with sharding.agreed(), writing():
            for path in (*folder.rglob("*"), folder) if sharding.is_main else ():
                _sync(path)
        with sharding.agreed(), writing():
            if sharding.is_main:
                _rename(folder, target)
    finally:
        if sharding.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    replaced = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    target.rename(replaced)
    folder.rename(target)
    shutil.rmtree(replaced)


@contextmanager
def writing() -> Iterator[None]:
    """Turns a failure to write into an `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"Writing the output failed ({error}): free space or choose another `output_dir`."
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
