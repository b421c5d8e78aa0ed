"""Signals as exceptions, so that a run that is ended can say what became of it and put in order
what it began.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Interrupted(SystemExit):
    """Somebody ended the run; its exit code is that of a shell, 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name

    def __str__(self) -> str:
        return f"The run was ended by {self.signal}."


@contextmanager
def interruptible() -> Iterator[None]:
    """While open, SIGTERM and SIGHUP raise `Interrupted` in the main thread; one that is ignored,
    as by `nohup`, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    changed = {number: handler for number, handler in before.items() if handler is signal.SIG_DFL}
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


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
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, end)
    if before is None:  # set by something that is not Python: it cannot be put back
        before = signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def undisturbed(later: bool = False) -> Iterator[None]:
    """While open, no signal interrupts: for the moments in which things are put in order.

    Args:
        later: Whether one that came meanwhile interrupts afterwards; else it is forgotten.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    # handlers of Python's own, because a child process would inherit that a signal is ignored or
    # blocked
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    changed = {
        number: handler
        for number, handler in handlers.items()
        if handler not in (None, signal.SIG_IGN)
    }
    for number in changed:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)
        if later and came:
            signal.raise_signal(came[0])
