"""Few-shot recalibration: the coefficients λ with which one fine-tune takes on its family's safety
vector.

The objective (see `objective.py`) has as many unknowns as layers or modules and is smooth and
deterministic. The gradients of the single samples, which come with one backward pass, give a
Gauss–Newton matrix to start from, and `trust_region.py` solves it in five to eight evaluations
without a learning rate.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config.settings import SafeGeneConfig
from ..data.calibration import CalibrationSet
from ..distributed.memory import has_own_memory
from ..errors import RecalibrationError
from ..models.attachment import VectorAttachment, frozen_for_calibration, recomputed_layers
from ..models.batch_size import fitting, halving
from ..models.parameters import base_model
from ..models.verification import Evidence
from .acceptance import SHRINK_STEPS, objection
from .objective import Losses, Objective, Passes, evaluate_objective
from .trust_region import minimize_in_box


# makes the model what is shipped with them, shape `(n,)`
Ship = Callable[[np.ndarray], AbstractContextManager[None]]


class _Message(IntEnum):
    """What rank 0, which runs the optimiser, tells the other ranks."""

    EVALUATE = 1  # the objective at the point that comes with it
    ENDED = 0  # the best point is among those evaluated
    FAILED = -1  # on rank 0 alone, between two evaluations: raise the error that it raises


@dataclass
class Recalibration:
    """The outcome of one recalibration.

    Attributes:
        coefficients: λ by coefficient name; 0 where the search left a layer out, and those carried
            where none are accepted.
        accepted: Whether held-out safety improved within the utility budget.
        reason: Why it was accepted, shrunk or rejected, in one sentence.
        scale: The share of the found λ that was kept (1 unless shrunk towards the lower bound).
        held_out_before: Held-out losses of the fine-tuned model.
        held_out_after: Held-out losses with the accepted (or last tried) coefficients.
        history: One entry per evaluation: objective, losses and coefficients.
        untouched: Names of coefficients that no sample reached: they stay what the weights carry.
        passes: How the passes were made: size of the batches, and what stayed in memory between
            them.
    """

    coefficients: dict[str, float]
    accepted: bool
    reason: str
    scale: float
    held_out_before: Losses
    held_out_after: Losses
    history: list[dict] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    # not what was found, but how
    passes: dict[str, Any] = field(default_factory=dict, compare=False)


def recalibrate(
    attachment: VectorAttachment,
    data: CalibrationSet,
    config: SafeGeneConfig,
    pad_id: int,
    on_evaluation: Callable[[dict], None] = lambda entry: None,
    start: Mapping[str, float] | None = None,
    ship: Ship | None = None,
) -> Recalibration:
    """Finds the coefficients of one fine-tune. The model is left exactly as it was.

    Where the model's weights hold `Σ carried·V` already, the coefficients and their bounds are
    still those of the whole vector, and the KL term's reference is the model as it is, λ =
    `carried`.

    Collective: every rank calls it with the same arguments and gets the same outcome, bit by bit;
    each works on its share of the batches. Where memory runs out it starts again with smaller
    batches.

    Args:
        attachment: The vector on the fine-tuned model.
        data: Harmful, benign and task samples.
        config: Bounds, weights and budgets.
        pad_id: Token id to pad with.
        on_evaluation: Called with each history entry, e.g. to move a progress bar.
        start: By name, where the search starts. Default: what is carried, else
            `config.search.start`.
        ship: Makes the model the one that would be shipped, which is accepted or not. Default: the
            vector is attached.

    Raises:
        RecalibrationError: A loss is not finite.
        UnsupportedModelError: The model's forward pass goes around one of the vector's modules.
        MemoryShortageError: Memory runs out with one sample at a time.
    """
    search = _Search(attachment, data, config, pad_id, on_evaluation, start, ship)
    size = _batch_size(attachment, data, config)
    search.roomy = (
        size if config.batch_size is None and has_own_memory(attachment.sharding.device) else None
    )
    try:
        found = halving(size, search.run, attachment.sharding)
        found.passes |= {"first_batch_size": size, "batch_size_set": config.batch_size is not None}
        found.passes |= {"factors": attachment.factors.describe()}
        return found
    finally:
        attachment.factors.clear()


def _batch_size(attachment: VectorAttachment, data: CalibrationSet, config: SafeGeneConfig) -> int:
    tokens = max(len(sample.input_ids) for sample in data.samples)
    responses = max(sum(sample.is_response) for sample in data.samples)
    return fitting(
        config.batch_size, base_model(attachment.model), tokens, responses, attachment.sharding
    )


def _not_finite(model: nn.Module) -> str:
    """What to say of a fine-tune whose own losses are not finite: numbers overflow in float16 that no
    training has made so large.
    """
    if next(base_model(model).parameters()).dtype is torch.float16:
        return (
            "The fine-tune's losses are not finite before anything is added to it: its numbers may be too large for float16, so "
            "load it in bfloat16 or float32; if they are not finite there either, its training has diverged."
        )
    return (
        "The fine-tune has diverged: its losses are not finite before anything is added to it. Train it again, with a lower "
        "learning rate or in float32."
    )


class _Search:
    """One recalibration, which can be run from its start with other batch sizes."""

    def __init__(
        self,
        attachment: VectorAttachment,
        data: CalibrationSet,
        config: SafeGeneConfig,
        pad_id: int,
        on_evaluation: Callable[[dict], None],
        start: Mapping[str, float] | None,
        ship: Ship | None,
    ):
        self.attachment, self.data, self.config, self.pad_id = attachment, data, config, pad_id
        self.model, self.sharding, self.names = (
            attachment.model,
            attachment.sharding,
            attachment.space.names,
        )
        self.on_evaluation, self.ship = on_evaluation, ship or self._attach
        self.held = np.array([attachment.carried[name] for name in self.names])
        first = start or (
            attachment.carried
            if self.held.any()
            else dict.fromkeys(self.names, config.search.start)
        )
        low, high = config.search.min_coefficient, config.search.max_coefficient
        self.start = np.array([first[name] for name in self.names]).clip(low, high)
        self.history: list[dict] = []
        self.touched = np.zeros(len(self.names), dtype=bool)
        self.roomy: int | None = (
            None  # batch size for which there is memory without gradient checkpointing
        )

    def _attach(self, point: np.ndarray) -> AbstractContextManager[None]:
        values = torch.tensor(point, dtype=torch.float32, device=self.sharding.device)
        return self.attachment.applied(values)

    def run(self, batch_size: int) -> Recalibration:
        self.history, self.touched = [], np.zeros(len(self.names), dtype=bool)
        self.attachment.evidence = Evidence()
        with frozen_for_calibration(self.model):
            keep = batch_size == self.roomy
            passes = Passes(self.pad_id, batch_size, keep)
            fit, held_out = (
                Objective(self.model, self.data, side, self.config, passes, self.sharding)
                for side in ("fit", "held_out")
            )
            before = held_out.losses(self.model)
            if not all(map(math.isfinite, before.to_dict().values())):
                raise RecalibrationError(_not_finite(self.model))
            best = self._minimize(fit)
            found = self._accept(held_out, best, before)
            recomputed = not keep and bool(recomputed_layers(self.model))
            found.passes = {
                "batch_size": batch_size,
                "activations": "recomputed" if recomputed else "kept",
            }
            return found

    def _minimize(self, fit: Objective) -> np.ndarray:
        """The best point: rank 0 runs the optimiser and the others follow it, so that unlike
        machines cannot part ways.
        """
        if self.sharding.is_main:
            self._lead(fit)
        else:
            self._follow(fit)
        return self._best()

    def _lead(self, fit: Objective) -> None:
        """Rank 0's part: it runs the optimiser, and tells the others what to do beside it."""
        evaluating = False  # what fails meanwhile fails on every rank: nobody has to be told

        def evaluate(point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            nonlocal evaluating
            evaluating = True
            self._tell(_Message.EVALUATE, point)
            found = self._evaluate(fit, point)
            evaluating = False
            self.on_evaluation(self.history[-1])
            return found

        config = self.config.search
        try:
            minimize_in_box(
                evaluate,
                self.start,
                config.min_coefficient,
                config.max_coefficient,
                config.max_evaluations,
            )
        except BaseException as error:
            if not evaluating:
                self._tell(_Message.FAILED)
                known = (
                    error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
                )
                with suppress(Exception), self.sharding.raising_together():
                    raise known from None
            raise
        self._tell(_Message.ENDED)

    def _follow(self, fit: Objective) -> None:
        """Every other rank's part: it does what rank 0 tells it, until that has ended or failed."""
        message, point = self._told()
        while message is _Message.EVALUATE:
            self._evaluate(fit, point)
            message, point = self._told()
        if message is _Message.FAILED:
            with self.sharding.raising_together():  # raises what rank 0 raises
                pass

    def _tell(self, message: _Message, point: np.ndarray | None = None) -> None:
        """Rank 0's half of a broadcast: the message, and the point to evaluate, 0 without one."""
        sent = torch.zeros(1 + len(self.names), dtype=torch.float64)
        sent[0] = message
        if point is not None:
            sent[1:] = torch.as_tensor(point)
        self.sharding.broadcast(sent)

    def _told(self) -> tuple[_Message, np.ndarray]:
        """The other ranks' half of it."""
        told = self.sharding.broadcast(torch.zeros(1 + len(self.names), dtype=torch.float64))
        return _Message(int(told[0])), told[1:].numpy()

    def _evaluate(self, fit: Objective, point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        value, losses, gradient, rows = evaluate_objective(
            self.model, fit, self.attachment.applied, point, self.config
        )
        if not self.history:
            self.attachment.check_effective()
        if not math.isfinite(value):
            raise RecalibrationError(
                "The recalibration loss is not finite with the safety vector on: make the vector again, or lower "
                "`search.max_coefficient`."
            )
        if not np.isfinite(
            gradient
        ).all():  # seen with fused attention on padded batches in bfloat16
            raise RecalibrationError(
                "The recalibration loss is finite and its gradient is not, as some fused attention kernels make it on padded "
                'batches in 16 bits: load the model with `attn_implementation="eager"`, or set `batch_size: 1`, which pads nothing.'
            )
        self.touched |= (rows != 0).any(axis=0)
        named = dict(zip(self.names, point.tolist(), strict=True))
        self.history.append({"objective": value, **losses.to_dict(), "coefficients": named})
        return value, gradient, rows

    def _best(self) -> np.ndarray:
        """The best point; a coefficient that no sample reached, of an expert that none was routed
        to, stays as it is carried.
        """
        best = min(self.history, key=lambda entry: entry["objective"])
        return np.where(self.touched, list(best["coefficients"].values()), self.held)

    def _accept(self, held_out: Objective, best: np.ndarray, before: Losses) -> Recalibration:
        """Takes λ if held-out safety improves within the budgets, else the largest share of the way
        to it that does.
        """
        config, failure, after = self.config, "", before
        origin = self.held.clip(config.search.min_coefficient, config.search.max_coefficient)
        untouched = [
            name for name, reached in zip(self.names, self.touched, strict=True) if not reached
        ]
        for scale in SHRINK_STEPS:
            point = np.where(self.touched, origin + scale * (best - origin), self.held)
            with self.ship(point):
                after = held_out.losses(self.model)
            objected = objection(before, after, config.search.max_utility_loss)
            if not objected:
                reason = "Held-out safety improved within the utility budget."
                if failure:
                    reason = f"Shrunk to {scale:.0%} of the found coefficients, because at full size {failure}."
                found = self.attachment.space.named(point.tolist())
                return Recalibration(
                    found, True, reason, scale, before, after, self.history, untouched
                )
            failure = failure or objected
        reason = f"No share of the found coefficients is acceptable: {failure}."
        carried = dict(self.attachment.carried)
        return Recalibration(carried, False, reason, 0.0, before, after, self.history, untouched)
