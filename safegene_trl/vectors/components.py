"""How alike the components of one vector are: cosines between their deltas.

`cos(V_c, V_k) = Σ_m ⟨V_{m,c}, V_{m,k}⟩ / (‖V_c‖ ‖V_k‖)` in the Frobenius inner product, over the
modules of a layer or of all. With the stacked factors, `⟨V_{m,c}, V_{m,k}⟩` is the sum of the block
(c, k) of `BᵀB ∘ AAᵀ`. Of categories (`extraction/category_split.py`) it says little how they are read,
as each is told from all others; `category_cosines` are of what they write.
"""

from collections.abc import Mapping, Sequence

import torch

from ..models.low_rank import LowRankDelta
from ..models.names import layer_index, layers_of


Table = list[list[float | None]]


def component_cosines(
    deltas: Mapping[str, LowRankDelta], components: Sequence[int]
) -> dict[str, Table]:
    """Pairwise cosines (−1 to 1) of a vector's components: `overall`, and `layers.N` for every layer;
    None where a component is zero.

    Args:
        deltas: The vector's, by module.
        components: Their ranks, as they are stacked.
    """
    owner = torch.arange(len(components)).repeat_interleave(torch.tensor(components))
    member = torch.nn.functional.one_hot(owner, len(components)).double()
    layers: dict[int, torch.Tensor] = {
        layer: torch.zeros(len(components), len(components), dtype=torch.float64)
        for layer in layers_of(deltas)
    }
    for name, delta in deltas.items():
        a, b = delta.a.double(), delta.b.double()
        layers[layer_index(name) or 0] += member.T @ ((b.T @ b) * (a @ a.T)) @ member
    whole = torch.stack([*layers.values()]).sum(dim=0)
    return {"overall": _cosines(whole)} | {
        f"layers.{layer}": _cosines(products) for layer, products in layers.items()
    }


def category_cosines(deltas: Mapping[str, LowRankDelta], count: int) -> Table:
    """Pairwise cosines of what a vector does to the prompts of its categories beyond what it does to
    all, `V (m_c − m̄)`: the mean over the modules that are split. These sum to zero over the
    categories, so that C of them that have nothing in common have −1/(C − 1).

    Args:
        deltas: Those of a vector by category.
        count: C, the number of its last parts of rank one.
    """
    found = []
    for delta in deltas.values():
        written = torch.nn.functional.normalize(delta.b[:, -count:].double(), dim=0)
        if bool(written.any(dim=0).all()):
            found.append(written.T @ written)
    if not found:
        return [[None] * count for _ in range(count)]
    table: Table = torch.stack(found).mean(dim=0).tolist()
    return table


def _cosines(products: torch.Tensor) -> Table:
    norms = products.diagonal().clamp(min=0).sqrt()
    return [
        [
            float(product / (one * two)) if one > 0 and two > 0 else None
            for product, two in zip(row, norms, strict=True)
        ]
        for row, one in zip(products, norms, strict=True)
    ]
