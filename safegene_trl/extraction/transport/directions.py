"""The direction in which a source model keeps harmful prompts apart, layer by layer.

With `h_l(x)` the pooled state of prompt `x` after layer `l`, and `g_l` what is looked at,

    v_l = mean_{harmful x} g_l(x) − mean_{benign x} g_l(x)

`g = h` of one aligned model (arXiv 2606.05290 takes the mean difference of pooled states, safe minus
unsafe), `g = h^aligned − h^degraded` of a pair, and `g = h^{aligned+V} − h^aligned` of an aligned
model and its safety vector `V`, of which nothing is subtracted.

Its size is told by `ρ_l = ‖v_l‖ / s_l`, `s_l` the root mean square distance of the anchors' states
from their mean. Whether there is a direction at all is told by halves: with the prompts split in two
at random, `cos(v', v'')` is near 1 where it is one of harm, and near 0 where it is one of chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import CalibrationDataError
from .states import BLOCK, Rows


HALVINGS = 20
FEWEST_PROMPTS = 8  # of each kind: halves of fewer say nothing


@dataclass(frozen=True)
class LayerDirection:
    """The direction in one layer of the source.

    Attributes:
        vector: `v_l`, float64, `(hidden,)`.
        spread: `s_l`, in the same units.
        agreement: Mean cosine (−1 to 1) of the directions of two halves of the prompts.
        harmful: Of every harmful prompt its part along `v_l`, over `s_l`; their mean minus that of
            the benign ones is `ρ_l`.
        benign: The same of every benign prompt.
    """

    vector: np.ndarray
    spread: float
    agreement: float
    harmful: np.ndarray
    benign: np.ndarray

    @property
    def size(self) -> float:
        """`ρ_l`."""
        return float(np.linalg.norm(self.vector)) / self.spread if self.spread else 0.0


def check_enough(harmful: Sequence[str], benign: Sequence[str]) -> None:
    """Raises `CalibrationDataError` for too few prompts to tell a direction from chance."""
    for name, prompts in (("harmful_data", harmful), ("benign_data", benign)):
        if len(prompts) < FEWEST_PROMPTS:
            raise CalibrationDataError(
                f"`{name}` gives {len(prompts)} prompts to take a direction from: give at least {FEWEST_PROMPTS}."
            )


def layer_direction(
    harmful: np.ndarray, benign: np.ndarray, spread: float, seed: int
) -> LayerDirection:
    """The direction of one layer.

    Args:
        harmful: `g_l` of the harmful prompts, prompts×hidden.
        benign: The same of the benign ones.
        spread: `s_l`.
        seed: For the halves.
    """
    vector = harmful.mean(axis=0) - benign.mean(axis=0)
    norm = float(np.linalg.norm(vector))
    along = vector / (norm * spread) if norm and spread else np.zeros_like(vector)
    return LayerDirection(
        vector, spread, _agreement(harmful, benign, seed), harmful @ along, benign @ along
    )


def _agreement(harmful: np.ndarray, benign: np.ndarray, seed: int) -> float:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(HALVINGS):
        halves = [np.array_split(draw.permutation(own), 2) for own in (harmful, benign)]
        one, other = (a.mean(axis=0) - b.mean(axis=0) for a, b in zip(*halves, strict=True))
        found.append(cosine(one, other))
    return float(np.mean(found))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine of two vectors, 0 where one of them is zero."""
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norms if norms else 0.0


def spread_of(states: Rows) -> float:
    """Root mean square distance of states from their mean, read in blocks."""
    count, total, squares = states.count, np.zeros(states.width), 0.0
    for start in range(0, count, BLOCK):
        block = states.read(slice(start, start + BLOCK))
        total += block.sum(axis=0)
        squares += float((block**2).sum())
    mean = total / count
    return float(np.sqrt(max(squares / count - float(mean @ mean), 0.0)))
