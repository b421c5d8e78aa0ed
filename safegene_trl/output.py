"""Where results go: folders that appear whole or not at all."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
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
    one is left; a failure to write, e.g. a full disk, becomes an `OutputError`. What a run that was killed has left beside
    `target` is cleared away, and an earlier folder that it had moved aside is put back. Collective where a `sharding` is given:
    the folder exists on rank 0 only, and is renamed only after all ranks have come to the end.
    """
    sharding = sharding or Sharding(torch.device("cpu"))
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_UNFINISHED}")
    with ExitStack() as held:
        try:
            with sharding.agreed(), writing():
                if sharding.is_main:
                    with suppress(FileNotFoundError):
                        _clear_leftovers(target)
                    check_output(target, marker=marker)
                    folder.mkdir(parents=True)
                    held.enter_context(_locked(folder))
            with writing():
                yield folder
            with sharding.agreed(), writing():
                if sharding.is_main:
                    _finish(folder)
            with sharding.agreed(), writing():
                if sharding.is_main:
                    _rename(folder, target)
        finally:
            if sharding.is_main:
                shutil.rmtree(folder, ignore_errors=True)


# A folder that is being written is locked by the process that writes it, so that it can be told from one whose process was killed.
_UNFINISHED, _MOVED_ASIDE = ".tmp", ".old"


def _rename(folder: Path, target: Path) -> None:
    with _locked(target.parent, wait=True):
        if target.exists():
            aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_MOVED_ASIDE}")
            target.rename(aside)
            folder.rename(target)
            _remove(aside)
        else:
            folder.rename(target)
        _sync(target.parent)


def _remove(folder: Path) -> None:
    """Under another name first: what is half removed must never be taken for a folder that was moved aside."""
    doomed = folder.with_suffix(_UNFINISHED)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _clear_leftovers(target: Path) -> None:
    with _locked(target.parent, wait=True):
        siblings = [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.")]
        for path in siblings:
            if path.suffix == _MOVED_ASIDE and not target.exists():
                path.rename(target)
            elif path.suffix == _MOVED_ASIDE:
                _remove(path)
            elif path.suffix == _UNFINISHED:
                with _locked(path) as free:
                    if free:
                        shutil.rmtree(path)


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Holds a lock on a folder that ends with the process; gives False where another has it, or the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Writes a text file that is, whenever it is read, the old one or the new one."""
    with writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)


def upload(folder: Path, repository: str, private: bool) -> None:
    """Puts a finished checkpoint on the hub, in one commit; the repository is made if it is not there.

    Raises:
        OutputError: It cannot be uploaded. The folder stays.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Safeguarded checkpoint")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise OutputError(
            f"{folder} is finished, but uploading it to {repository} failed ({error}): check your access, then `hf upload` it."
        ) from error


@contextmanager
def writing() -> Iterator[None]:
    """Turns a failure to write into an `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"Writing the output failed ({error}): free space or choose another `output_dir`."
        ) from error


def _finish(folder: Path) -> None:
    """Flushes all files to disk, each as readable as the folder is: safetensors makes them for their owner alone."""
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(PermissionError):  # file systems without modes
                path.chmod(readable)
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_places(target, inputs):
    pass


def check_hub(repository):
    pass
