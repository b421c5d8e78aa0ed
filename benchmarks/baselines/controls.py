"""Controls: vectors that should not work if it is the safety vector that does."""

from collections.abc import Mapping

import torch

from safegene_trl.models.low_rank import LowRankDelta


def random_vector(vector: Mapping[str, LowRankDelta], seed: int) -> dict[str, LowRankDelta]:
    """Deltas of the same rank and, module by module, of the same Frobenius norm, in random
    directions.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, delta in vector.items():
        random = LowRankDelta(
            *(torch.randn(part.shape, generator=generator) for part in (delta.a, delta.b))
        )
        size = (delta.inner(delta) / random.inner(random)) ** 0.25
        found[name] = LowRankDelta(random.a * size, random.b * size)
    return found


def random_layers(layers: list[int], count: int, seed: int) -> list[int]:
    """`count` of the layers, drawn at random."""
    order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(layers[i] for i in order[:count])
