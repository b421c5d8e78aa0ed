"""A process that looks at the target all the time, as a server that reloads checkpoints would."""

import hashlib
import mmap
import os
import signal
import time
from pathlib import Path

from .world import MARKER, fork, wait


def whole(target: Path) -> dict[str, str] | None:
    """Hashes of all files but the reports, read through the folder itself, so that a renaming in
    between does not matter.

    None where the folder was renamed or taken away meanwhile: then what was read says nothing.
    """
    try:
        folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        found = _files(folder)
        same = os.stat(target).st_ino == os.fstat(folder).st_ino
        return found if same else None
    except OSError:
        return {} if target.exists() and os.stat(target).st_ino == os.fstat(folder).st_ino else None
    finally:
        os.close(folder)


def _files(folder: int, prefix: str = "") -> dict[str, str]:
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            inner = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
            try:
                found |= _files(inner, f"{prefix}{entry.name}/")
            finally:
                os.close(inner)
        elif not entry.name.startswith(Path(MARKER).stem):
            with open(os.open(entry.name, os.O_RDONLY, dir_fd=folder), "rb") as file:
                found[prefix + entry.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class Reader:
    """Looks at a target from `__enter__` to `__exit__`; then `wrong` says what it saw that must not
    be.

    Args:
        target: The folder.
        allowed: What it may be.
    """

    INTERVAL = 0.001  # seconds between two looks: it shares the core with the run

    def __init__(self, target: Path, allowed: list[dict[str, str]]):
        self.target, self.allowed = target, allowed
        # stop, absent once there, mixed, and that it has looked
        self.shared = mmap.mmap(-1, mmap.PAGESIZE)

    def __enter__(self) -> "Reader":
        self.child = fork(self._look)
        deadline = time.monotonic() + 30
        while not self.shared[3] and time.monotonic() < deadline:
            time.sleep(0.0005)
        return self

    def __exit__(self, *error: object) -> None:
        self.shared[0] = 1
        if wait(self.child, 30) is None:
            raise RuntimeError("the reader hangs")

    @property
    def wrong(self) -> list[str]:
        return [
            word for place, word in ((1, "absent once there"), (2, "mixed")) if self.shared[place]
        ]

    def _look(self) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        there, known = False, None
        while not self.shared[0]:
            try:
                status = os.stat(self.target)
            except FileNotFoundError:
                status = None
            if status is None:
                self.shared[1] |= there
            elif (stamp := (status.st_ino, status.st_mtime_ns)) != known:
                found = whole(self.target)
                if found is not None:
                    self.shared[2] |= found not in self.allowed
                    there, known = True, stamp
            self.shared[3] = 1
            time.sleep(self.INTERVAL)
        return 0
