"""Progress bars of what takes longer than two seconds: in commands and in a step that shows its own,
and nowhere else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:
    from tqdm import tqdm


Item = TypeVar("Item")
_DELAY = 2.0  # seconds
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
    from tqdm.auto import tqdm

    return tqdm(
        total=total, desc=what, unit=unit, delay=_DELAY, leave=False, disable=not _SHOWN.get()
    )
