"""What goes wrong while something is written, said as an `OutputError`."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ..errors import OutputError, SafeGeneError


@contextmanager
def writing() -> Iterator[None]:
    """Turns a failure to write into an `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"Writing the output failed ({error}): free space or choose another `output_dir`."
        ) from error


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turns whatever a writer of another library raises into an `OutputError` that names what was
    to be saved.

    They have no errors of their own: of a full disk `tokenizers` raises a plain `Exception`, and of
    a value that it refuses to save transformers a `ValueError`. So nothing but the saving itself
    belongs into the block.
    """
    try:
        yield
    except SafeGeneError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OutputError(
            f"Saving {what} failed ({type(error).__name__}: {reason}): correct what it names, free space, or choose another `output_dir`."
        ) from error
