"""SIGTERM as an exception, so that a run that a scheduler ends can still say what became of it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


CODE = 128 + signal.SIGTERM


@contextmanager
def terminable() -> Iterator[None]:
    """While open, a first SIGTERM raises `SystemExit(143)`; a second one does what it did before.

    Only the main thread of a process can do that; elsewhere SIGTERM keeps its meaning.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        raise SystemExit(CODE)

    before = signal.signal(signal.SIGTERM, end)
    if before is None:  # set by something that is not Python: it cannot be put back
        before = signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
