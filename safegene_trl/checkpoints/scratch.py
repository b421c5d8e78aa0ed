"""Folders for what has to lie on a disk for as long as something works with it."""

import tempfile

from ..errors import OutputError


def scratch_folder(purpose: str) -> tempfile.TemporaryDirectory[str]:
    """A folder for this process's user alone, removed in the end.

    Args:
        purpose: What needs it, as a message says it after "for".

    Raises:
        OutputError: There is no place for one.
    """
    try:
        return tempfile.TemporaryDirectory(prefix="safegene-")
    except OSError as error:
        raise OutputError(
            f"No temporary folder can be made for {purpose} ({error.strerror or error}): free space, or set `TMPDIR` "
            "to a folder that can be written to."
        ) from error
