"""Progress bars of what takes longer than two seconds: in commands and in a step that shows its own,
and nowhere else.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO, TypeVar


if TYPE_CHECKING:
    from tqdm import tqdm


Item = TypeVar("Item")
_DELAY = 2.0  # seconds
_BETWEEN, _BETWEEN_IN_LOGS = 0.1, 30.0  # seconds from one drawing to the next
_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)
_NEVER: ContextVar[bool] = ContextVar("never", default=False)


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """While open, bars are shown, or not, whatever was said outside."""
    token = _SHOWN.set(may_show(shown))
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def no_progress() -> Iterator[None]:
    """While open, no bar is shown, whatever is said inside."""
    token = _NEVER.set(True)
    try:
        with progress_shown(False):
            yield
    finally:
        _NEVER.reset(token)


def may_show(shown: bool = True) -> bool:
    """Whether a bar that is to be shown, or not, is."""
    return shown and not _NEVER.get()


def in_progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, with a bar that says how many are done."""
    with progress_bar(what, len(items), "batch") as bar:
        for item in items:
            yield item
            bar.update()


def progress_bar(what: str, total: int, unit: str) -> "tqdm":
    """A bar that is moved by its `update`, and goes when it is closed."""
    return bar_of(what, total, shown=_SHOWN.get(), unit=unit, delay=_DELAY)


def bar_of(what: str, total: int, shown: bool, **options: Any) -> "tqdm":
    """A bar that never ends the work it tells of, where nothing can be written any more. Anywhere
    else than on a terminal, as in a log, it is drawn twice a minute.

    Args:
        what: What is done.
        total: How often, or how many units.
        shown: Whether it is to be shown. `TQDM_DISABLE` in the environment hides it in any case.
        options: Others of tqdm's.
    """
    from tqdm.auto import tqdm

    stream = sys.stderr
    hidden = not may_show(shown) or stream is None or _is_hidden_by_environment()
    seconds = _BETWEEN if _is_terminal(stream) else _BETWEEN_IN_LOGS
    return tqdm(
        total=total,
        desc=what,
        disable=hidden,
        leave=False,
        file=_Unfailing(stream),
        mininterval=seconds,
        maxinterval=max(seconds, 10.0),
        **options,
    )


def _is_terminal(stream: TextIO | None) -> bool:
    with suppress(OSError, ValueError):
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return False  # it is closed


def _is_hidden_by_environment() -> bool:
    return os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")


class _Unfailing:
    """A stream that loses what cannot be written: its reader has left, or its disk is full."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()
