"""Which layer of the source each layer of the target takes its direction from.

`depth`: the one at the same share of the model's depth, `l_s = round(l_t (L_s − 1) / (L_t − 1))`.

`cka`: the one whose states of the anchors are most alike up to a rotation, by linear centred kernel
alignment with Song et al.'s unbiased estimate of HSIC (arXiv 1905.00414, 2010.15327), which does not
grow with the width where there are few texts:

    CKA(K, L) = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)),   K = S Sᵀ and L = T Tᵀ with a zero diagonal,
    HSIC(K, L) = [tr(K L) + 1ᵀK1·1ᵀL1 / ((n−1)(n−2)) − 2/(n−2) 1ᵀK L1] / (n (n−3))

on the first `GRAMS` of the anchors that the maps are fitted on, so that memory does not grow.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .states import Rows


GRAMS = 512


def by_depth(source: Sequence[Rows], target: Sequence[Rows], rows: np.ndarray) -> list[int]:
    """For each layer of the target the source's of the same relative depth.

    Args:
        source: The anchors' states, by layer of the source.
        target: The same of the target.
        rows: Which anchors may be looked at.
    """
    last, deepest = len(source) - 1, max(len(target) - 1, 1)
    return [round(layer * last / deepest) for layer in range(len(target))]


def by_cka(source: Sequence[Rows], target: Sequence[Rows], rows: np.ndarray) -> list[int]:
    """For each layer of the target that of the source with the most similar states; arguments as of
    `by_depth`.
    """
    table = cka(source, target, rows)
    return [int(column.argmax()) for column in table.T]


def cka(source: Sequence[Rows], target: Sequence[Rows], rows: np.ndarray) -> np.ndarray:
    """Alignment of all pairs of layers, source×target; 1 is the same up to a rotation and a scale,
    and about 0 without any relation.
    """
    chosen = np.sort(rows[:GRAMS])
    grams = [[_gram(layer.read(chosen)) for layer in layers] for layers in (source, target)]
    own = [[_hsic(gram, gram) for gram in side] for side in grams]
    table = np.zeros((len(source), len(target)))
    for i, one in enumerate(grams[0]):
        for j, other in enumerate(grams[1]):
            scale = own[0][i] * own[1][j]
            table[i, j] = _hsic(one, other) / np.sqrt(scale) if scale > 0 else 0.0
    return table


def _gram(states: np.ndarray) -> np.ndarray:
    centred = states - states.mean(axis=0)
    gram = centred @ centred.T
    np.fill_diagonal(gram, 0.0)
    return gram


def _hsic(one: np.ndarray, other: np.ndarray) -> float:
    n = len(one)
    sums = one.sum(axis=0), other.sum(axis=0)
    whole = float(sums[0].sum() * sums[1].sum()) / ((n - 1) * (n - 2))
    crossed = 2 * float(sums[0] @ sums[1]) / (n - 2)
    return (float((one * other).sum()) + whole - crossed) / (n * (n - 3))


MATCHINGS: dict[str, Callable[[Sequence[Rows], Sequence[Rows], np.ndarray], list[int]]] = {
    "depth": by_depth,
    "cka": by_cka,
}
