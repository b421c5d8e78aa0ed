"""Maps from the states of one model to those of another, fitted on benign anchor texts alone (arXiv
2606.05290). With `s` and `t` the states of a text in source and target, `s̄` and `t̄` their means:

- `procrustes`: `f(s) = t̄ + c Qᵀ(s − s̄)`. With `Σ_st = U D Wᵀ` the singular value decomposition of the
  cross-covariance, `Q = U Wᵀ` is the rotation nearest to it, semi-orthogonal between unlike widths,
  and `c = tr D / tr Σ_ss`. Directions in which the anchors do not vary together are mapped to 0.
- `ridge`: `f(s) = t̄ + Mᵀ(s − s̄)`, `M = (Σ_ss + κ I)⁻¹ Σ_st` with `κ = penalty · tr Σ_ss / d_s`.
- `mlp`: `ridge` and `B gelu(A (s − s̄)/σ)` on top, learned by Adam from `B = 0`; `σ` is the source's
  root mean square deviation, per number.

The covariances are summed up in float64 from blocks of rows, so that memory does not grow with the
number of anchors. A direction `v` becomes `mean_x [f(x + v) − f(x)]`, over the states `x` of benign
prompts: of a linear map that is `Mᵀ v`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import CalibrationDataError
from .directions import cosine
from .states import BLOCK, Rows


HIDDEN = 256  # units of the `mlp`
EPOCHS, BATCH, LEARNING_RATE, DECAY = 40, 64, 1e-3, 1e-2
_NOTHING = 1e-9  # of the largest singular value


class StateMap(Protocol):
    """`f`."""

    @property
    def target_mean(self) -> np.ndarray:
        """`t̄`, `(d_t,)`."""

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """States of the target, rows×d_t, for rows×d_s of the source."""


@dataclass(frozen=True)
class Linear:
    """`f(s) = t̄ + Mᵀ(s − s̄)`; `matrix` is d_s×d_t."""

    source_mean: np.ndarray
    target_mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, states: np.ndarray) -> np.ndarray:
        return self.target_mean + (states - self.source_mean) @ self.matrix


@dataclass(frozen=True)
class Perceptron:
    """`linear` and a layer of hidden units on top."""

    linear: Linear
    scale: np.ndarray
    into: torch.Tensor
    out: torch.Tensor

    @property
    def target_mean(self) -> np.ndarray:
        return self.linear.target_mean

    def __call__(self, states: np.ndarray) -> np.ndarray:
        inner = torch.from_numpy((states - self.linear.source_mean) / self.scale)
        more = F.gelu(inner @ self.into.double()) @ self.out.double()
        return self.linear(states) + more.numpy()


@dataclass(frozen=True)
class Moments:
    """Means and covariances of states in both models over the same texts, float64.

    Attributes:
        source_mean, target_mean: `s̄`, `t̄`.
        within: `Σ_ss`, d_s×d_s.
        across: `Σ_st`, d_s×d_t.
        count: Of texts.
    """

    source_mean: np.ndarray
    target_mean: np.ndarray
    within: np.ndarray
    across: np.ndarray
    count: int

    @classmethod
    def of(cls, source: Rows, target: Rows, rows: np.ndarray) -> "Moments":
        """Of some of the texts, which are read twice, block by block."""
        means = [np.zeros(source.width), np.zeros(target.width)]
        for blocks in _blocks(source, target, rows):
            for mean, block in zip(means, blocks, strict=True):
                mean += block.sum(axis=0) / len(rows)
        within = np.zeros((source.width, source.width))
        across = np.zeros((source.width, target.width))
        for one, other in _blocks(source, target, rows):
            one -= means[0]
            within += one.T @ one / len(rows)
            across += one.T @ (other - means[1]) / len(rows)
        return cls(means[0], means[1], within, across, len(rows))

    def linear(self, matrix: np.ndarray) -> Linear:
        """The map with this matrix."""
        return Linear(self.source_mean, self.target_mean, matrix)


def _blocks(
    source: Rows, target: Rows, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(rows), BLOCK):
        chosen = rows[start : start + BLOCK]
        yield source.read(chosen), target.read(chosen)


@dataclass(frozen=True)
class Fit:
    """What a map is fitted on.

    Attributes:
        source, target: The anchors' states.
        rows: Which of the anchors.
        penalty: Of `ridge`, in the source's mean variance.
        seed: For what is drawn.
    """

    source: Rows
    target: Rows
    rows: np.ndarray
    penalty: float
    seed: int


def procrustes(fit: Fit) -> Linear:
    """The nearest semi-orthogonal map."""
    moments = Moments.of(fit.source, fit.target, fit.rows)
    left, values, right = np.linalg.svd(moments.across, full_matrices=False)
    kept = values > _NOTHING * values.max(initial=0.0)
    total = np.trace(moments.within)
    scale = values[kept].sum() / total if total else 0.0
    return moments.linear(scale * left[:, kept] @ right[kept])


def ridge(fit: Fit) -> Linear:
    """The regression of the target's states on the source's."""
    return _ridge(Moments.of(fit.source, fit.target, fit.rows), fit.penalty)


def _ridge(moments: Moments, penalty: float) -> Linear:
    width = len(moments.within)
    shift = penalty * np.trace(moments.within) / width
    return moments.linear(
        np.linalg.lstsq(moments.within + shift * np.eye(width), moments.across, rcond=None)[0]
        if not shift
        else np.linalg.solve(moments.within + shift * np.eye(width), moments.across)
    )


def mlp(fit: Fit) -> Perceptron:
    """The same with a hidden layer on top."""
    moments = Moments.of(fit.source, fit.target, fit.rows)
    linear = _ridge(moments, fit.penalty)
    deviation = np.sqrt(np.diag(moments.within))
    scale = np.where(deviation > 0, deviation, 1.0)
    draw = torch.Generator().manual_seed(fit.seed)
    width = fit.source.width
    into = (torch.randn(width, HIDDEN, generator=draw) / width**0.5).requires_grad_()
    out = torch.zeros(HIDDEN, fit.target.width, requires_grad=True)
    found = Perceptron(linear, scale, into.detach(), out.detach())
    adam = torch.optim.AdamW([into, out], lr=LEARNING_RATE, weight_decay=DECAY)
    size = _size(linear, fit)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(fit.rows), generator=draw).split(BATCH):
            rows = np.sort(fit.rows[chosen.numpy()])
            states = fit.source.read(rows)
            inner = torch.from_numpy((states - moments.source_mean) / scale).float()
            left = torch.from_numpy(fit.target.read(rows) - linear(states)).float() / size
            loss = (F.gelu(inner @ into) @ out - left).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        out.mul_(size)  # `found` holds the tensor itself
    return found


def _size(linear: Linear, fit: Fit) -> float:
    """Root mean square of what a linear map leaves, per number; 1 where it leaves nothing."""
    squares = sum(
        float(((other - linear(one)) ** 2).sum())
        for one, other in _blocks(fit.source, fit.target, fit.rows)
    )
    return float(np.sqrt(squares / (len(fit.rows) * fit.target.width))) or 1.0


MAPS: dict[str, Callable[[Fit], StateMap]] = {
    "procrustes": procrustes,
    "ridge": ridge,
    "mlp": mlp,
}


@dataclass(frozen=True)
class Quality:
    """How well a map does on texts that it was not fitted on.

    Attributes:
        explained: `R²`, the share of the target's variance (at most 1, negative where the mean
            would do better).
        cosine: Mean cosine (−1 to 1) of mapped and true states, both less `t̄`.
    """

    explained: float
    cosine: float


def held_out_quality(found: StateMap, source: Rows, target: Rows, rows: np.ndarray) -> Quality:
    """Of a map on some texts.

    Args:
        found: The map.
        source: States in the source.
        target: States in the target.
        rows: Those that it was not fitted on.
    """
    missed = total = cosines = 0.0
    mean = found.target_mean
    for one, other in _blocks(source, target, rows):
        guess, truth = found(one) - mean, other - mean
        missed += float(((guess - truth) ** 2).sum())
        total += float((truth**2).sum())
        cosines += sum(map(cosine, guess, truth))
    return Quality(1 - missed / total if total else 0.0, cosines / len(rows))


def carried(found: StateMap, vector: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A direction of the source in the target: `mean_x [f(x + v) − f(x)]`, `(d_t,)`.

    Args:
        found: The map.
        vector: `v`, `(d_s,)`.
        at: States of the source, rows×d_s.
    """
    return (found(at + vector) - found(at)).mean(axis=0)


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which anchors a map is fitted on, and which are held out: every fifth."""
    rows = np.arange(count)
    return rows[rows % 5 != 4], rows[rows % 5 == 4]


def rank_warning(fitted: int, width: int, kind: str, penalty: float) -> str:
    """A sentence where there are fewer anchors than the source's states have numbers; else empty.

    Args:
        fitted: Anchors that the map is fitted on.
        width: Numbers of a state of the source.
        kind: Of `MAPS`.
        penalty: Of `ridge`.

    Raises:
        CalibrationDataError: The map would go through every anchor, whatever it says of others.
    """
    if fitted > width:
        return ""
    needed = -(-(width + 1) * 5 // 4)
    said = (
        f"The map is fitted on {fitted} anchors and the source's states have {width} numbers, so it knows nothing of at least "
        f"{width - fitted + 1} directions: {needed} anchors are needed for all of them"
    )
    if kind != "procrustes" and penalty == 0:
        raise CalibrationDataError(f"{said}; give as many, or set `map_penalty` above 0.")
    return f"{said}."
