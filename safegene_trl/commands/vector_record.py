"""What `--json` says of a safety vector, in every command that makes or reads one."""

from collections import Counter
from typing import TYPE_CHECKING, Any, Union

from ..vectors.prompt_rows import part_of
from ..vectors.record import VectorRecord


if TYPE_CHECKING:
    from ..vectors.safety_vector import SafetyVector


def record_of(vector: Union[VectorRecord, "SafetyVector"], place: str) -> dict[str, Any]:
    """The vector's shape, its own records of how it was made, and how many prompts of each part it
    has; no prompt and no weight.

    Args:
        vector: The vector, with or without weights.
        place: Its folder or hub id.
    """
    return {
        "vector": place,
        "architecture": vector.family.architecture,
        "aligned_model": vector.aligned_model,
        "degraded_model": vector.degraded_model,
        "rank": vector.rank,
        "components": vector.components,
        "component_names": vector.component_names,
        "layers": list(vector.layers),
        "extraction": vector.extraction,
        "selection": vector.selection,
        "prompts": dict(Counter(map(part_of, vector.prompts))),
        "soft_targets": sum("targets" in row for row in vector.prompts),
    }
