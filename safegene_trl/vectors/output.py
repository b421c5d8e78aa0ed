"""Where `extract` and `combine` put a vector: never over an earlier one, unless that is asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.contents import VECTOR
from ..checkpoints.places import check_places
from ..checkpoints.preflight import check_output
from ..errors import OutputError


def check_vector_output(target: Path, inputs: Mapping[str, Any], overwrite: bool) -> None:
    """Raises `OutputError` unless a vector can be put at `target` without losing anything.

    Args:
        target: The folder to be.
        inputs: What is read, by what it is called in messages; `target` must not be, hold or lie in
            any of it.
        overwrite: Whether an earlier vector may be replaced. Others may rest on it or its
            signature.
    """
    check_places(target, inputs)
    check_output(target, kind=VECTOR)
    if not overwrite and (target / VECTOR.marker).is_file():
        raise OutputError(
            f"{target} holds a safety vector already: choose another `output_dir`, or set `overwrite_output_dir` to replace it."
        )
