"""How alike safety vectors are: cosines between their deltas, per layer and overall.

`cos(V, W) = ⟨V, W⟩ / (‖V‖‖W‖)` in the Frobenius inner product, over the modules that both vectors
have. Vectors from different degradations of one family that agree point at the same safety
directions (arXiv 2606.06519 mentions 0.62 to 0.81).
"""

from collections.abc import Mapping, Sequence

from ..errors import FamilyError
from ..models.low_rank import LowRankDelta
from ..models.names import layer_index
from .safety_vector import SafetyVector


Deltas = Mapping[str, LowRankDelta]


def cosine(one: Deltas, two: Deltas, layer: int | None = None) -> float | None:
    """Cosine (−1 to 1) over the modules that both have, of one layer or of all; None where there
    are none.
    """
    names = [name for name in one if name in two and layer in (None, layer_index(name))]
    product, first, second = (
        sum(left[name].inner(right[name]) for name in names)
        for left, right in ((one, two), (one, one), (two, two))
    )
    return product / (first * second) ** 0.5 if first > 0 and second > 0 else None


def cosine_table(vectors: Sequence[SafetyVector]) -> dict[str, list[list[float | None]]]:
    """Pairwise cosines: `overall`, and `layers.N` for every layer that two vectors share.

    Raises:
        FamilyError: The vectors are of different families.
    """
    if len({vector.family.fingerprint for vector in vectors}) > 1:
        raise FamilyError("The vectors are of different families: compare vectors of one family.")
    layers = sorted({layer for vector in vectors for layer in vector.layers})
    tables = {"overall": _pairwise(vectors, None)} | {
        f"layers.{layer}": _pairwise(vectors, layer) for layer in layers
    }
    return {name: table for name, table in tables.items() if name == "overall" or _shared(table)}


def _pairwise(vectors: Sequence[SafetyVector], layer: int | None) -> list[list[float | None]]:
    return [[cosine(one.deltas, two.deltas, layer) for two in vectors] for one in vectors]


def _shared(table: list[list[float | None]]) -> bool:
    return any(
        value is not None for i, row in enumerate(table) for j, value in enumerate(row) if i != j
    )
