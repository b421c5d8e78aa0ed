"""One run at a time in a folder: a lock that ends with the process, however it ends."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError


logger = logging.getLogger(__name__)


@contextmanager
def alone_in(
    folder: Path, what: str, remedy: str = "wait for it or choose another `output_dir`"
) -> Iterator[int]:
    """Holds the file `.lock` in a folder, which is made if it is not there; gives its descriptor.

    A child process that is given the descriptor holds the lock as well, until it ends.

    Args:
        folder: The folder.
        what: Names a run of this kind in a message, e.g. `evaluation`.
        remedy: What to do, as the end of the message.

    Raises:
        OutputError: Another run holds it, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # not removed at the end: another run might have opened it meanwhile
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written to ({error.strerror}): choose another `output_dir`."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"Another {what} is at work in {folder}: {remedy}.") from error
        except OSError as error:
            logger.warning(
                "%s has no locks (%s): nothing keeps a second %s away.",
                folder,
                error.strerror,
                what,
            )
        yield descriptor
    finally:
        os.close(descriptor)
