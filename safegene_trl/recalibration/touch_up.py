"""A low-rank touch-up: what a vector's coefficients do not reach, learned from the same shots.

With λ as it was found,

    min_{A,B}  the objective of the recalibration with  W + λ·V + B A,

a LoRA (arXiv 2106.09685) of rank 8 on every linear module of the vector, by a few steps of AdamW
(arXiv 1711.05101) on a few samples of every term. It has thousands of times as many unknowns as the
coefficients, so that the shots that are fitted on soon say little of others: what is kept is the
step at which those that are held out have the objective lowest, and it is taken only by the rule
for coefficients.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from ..config.settings import SafeGeneConfig
from ..data.calibration import CalibrationSet, Split
from ..errors import MemoryShortageError
from ..models.attachment import VectorAttachment, frozen_for_calibration
from ..models.batch_size import halving
from ..models.low_rank import LowRankDelta
from ..models.trained_deltas import TrainedDeltas
from ..text import told_apart
from .acceptance import objection
from .objective import Losses, Objective, Passes, term_weights
from .search import Recalibration


RANK, STEPS, EVERY = 8, 48, 8  # held-out shots are looked at every so many steps
PER_TERM = 8  # samples of every term in a step
LEARNING_RATE = 3e-4  # at first; it falls to 0 in a line
LARGEST_NORM = 1.0  # of a gradient

# makes the model what is shipped with the vector, at the coefficients found, and these deltas
ShipWith = Callable[[Mapping[str, LowRankDelta]], AbstractContextManager[None]]


@dataclass(frozen=True)
class TouchUp:
    """The outcome of one training.

    Attributes:
        accepted: Whether held-out safety improves within the utility budget, and the held-out
            objective is lower than with the vector alone.
        reason: Why, or why not, as a part of a sentence.
        deltas: By module name, of rank `RANK`, float32 on the CPU; empty where it has diverged or
            no step was lower than the start.
        held_out_by_step: Steps, and the held-out objective after them; 0 is the vector alone.
        held_out: Held-out losses of the model that would be shipped; None where there are no
            deltas.
    """

    accepted: bool
    reason: str
    deltas: dict[str, LowRankDelta] = field(default_factory=dict)
    held_out_by_step: tuple[tuple[int, float], ...] = ()
    held_out: Losses | None = None


def drawn(data: CalibrationSet, generator: torch.Generator) -> CalibrationSet:
    """Of every term a few samples to fit on: those of one step."""

    def some(split: Split) -> Split:
        order = torch.randperm(len(split.fit), generator=generator)[:PER_TERM]
        return Split([split.fit[index] for index in order.tolist()], [])

    benign = data.all_benign
    return CalibrationSet(some(data.harmful), some(data.task), benign and some(benign))


class _Diverged(Exception):
    """A loss or a gradient is no number, in all ranks alike."""


def train_touch_up(
    attachment: VectorAttachment,
    data: CalibrationSet,
    config: SafeGeneConfig,
    pad_id: int,
    found: Recalibration,
    ship: ShipWith,
    on_step: Callable[[], object] = lambda: None,
) -> TouchUp:
    """Trains a touch-up beside the vector, and says whether it is taken. The model is left exactly
    as it was.

    Collective: every rank calls it with the same arguments and gets the same outcome; each works on
    its share of the batches. Where memory runs out it starts again with smaller batches; where it
    runs out with one sample at a time no touch-up is taken.

    Args:
        attachment: The vector on the fine-tuned model, on one linear module at least.
        data: Harmful, benign and task samples.
        config: Weights, budget, and the seed of `A` and of what is drawn.
        pad_id: Token id to pad with.
        found: What the search found for the fine-tune: the coefficients that stay.
        ship: Makes the model the one that would be shipped.
        on_step: Called after each step, e.g. to move a progress bar.
    """
    training = _Training(attachment, data, config, pad_id, found, ship, on_step)
    try:
        return halving(found.passes["batch_size"], training.run, attachment.sharding)
    except MemoryShortageError:
        return TouchUp(False, "memory ran out with one sample at a time")
    finally:
        attachment.factors.clear()


class _Training:
    """One training, which can be run from its start with other batch sizes."""

    def __init__(
        self,
        attachment: VectorAttachment,
        data: CalibrationSet,
        config: SafeGeneConfig,
        pad_id: int,
        found: Recalibration,
        ship: ShipWith,
        on_step: Callable[[], object],
    ):
        self.attachment, self.data, self.config, self.pad_id = attachment, data, config, pad_id
        self.model, self.sharding = attachment.model, attachment.sharding
        self.found, self.ship, self.on_step = found, ship, on_step
        self.weights = term_weights(config)
        self.path: list[tuple[int, float]] = []

    def run(self, batch_size: int) -> TouchUp:
        self.path = []
        passes = Passes(self.pad_id, batch_size)
        generator = torch.Generator().manual_seed(self.config.seed)
        with frozen_for_calibration(self.model):
            held_out = self._objective(self.data, "held_out", passes)
            trained = TrainedDeltas(
                self.model, self.attachment.deltas, RANK, generator, self.sharding.device
            )
            try:
                best = self._best(trained, held_out, passes, generator)
            except _Diverged:
                reason = "its training has diverged: a loss or a gradient was not finite"
                return TouchUp(False, reason, held_out_by_step=tuple(self.path))
            if best is None:
                reason = "no step of its training had a lower held-out objective than the start"
                return TouchUp(False, reason, held_out_by_step=tuple(self.path))
            # machines that are not alike may have rounded differently
            return self._accept(held_out, trained.deltas(self.sharding.broadcast(best)))

    def _objective(self, data: CalibrationSet, side: str, passes: Passes) -> Objective:
        return Objective(self.model, data, side, self.config, passes, self.sharding)

    @contextmanager
    def _attached(self, trained: TrainedDeltas) -> Iterator[None]:
        values = self.attachment.space.values(self.found.coefficients).to(self.sharding.device)
        with self.attachment.applied(values), trained.applied():
            yield

    def _best(
        self,
        trained: TrainedDeltas,
        held_out: Objective,
        passes: Passes,
        generator: torch.Generator,
    ) -> torch.Tensor | None:
        """All steps; the factors' numbers after the one whose held-out objective is lowest, None
        where that is the start.
        """
        optimizer = torch.optim.AdamW(trained.parameters, lr=LEARNING_RATE, weight_decay=0.0)
        best = None
        self._look(0, trained, held_out)
        for step in range(1, STEPS + 1):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (step - 1) / STEPS)
            self._set_gradient(trained, self._objective(drawn(self.data, generator), "fit", passes))
            optimizer.step()
            self.on_step()
            if step % EVERY == 0 and self._look(step, trained, held_out):
                best = trained.values
        return best

    def _set_gradient(self, trained: TrainedDeltas, fit: Objective) -> None:
        with self._attached(trained):
            value, gradient = fit.gradient_by(self.model, trained.parameters, self.weights)
        if not (math.isfinite(value) and bool(gradient.isfinite().all())):
            raise _Diverged
        for each, own in zip(trained.parameters, trained.shaped(gradient), strict=True):
            each.grad = own.to(each.device)
        torch.nn.utils.clip_grad_norm_(trained.parameters, LARGEST_NORM)

    def _look(self, step: int, trained: TrainedDeltas, held_out: Objective) -> bool:
        """Whether the held-out objective is lower than it ever was."""
        with self._attached(trained):
            value = self._value(held_out)
        if not math.isfinite(value):
            raise _Diverged
        lowest = min((earlier for _, earlier in self.path), default=math.inf)
        self.path.append((step, value))
        return value < lowest

    def _value(self, held_out: Objective) -> float:
        """The objective of the model as it is."""
        losses = held_out.losses(self.model, held_out.temperature).to_dict()
        return sum(self.weights[term] * loss for term, loss in losses.items())

    def _accept(self, held_out: Objective, deltas: dict[str, LowRankDelta]) -> TouchUp:
        """As coefficients are taken, and only if the objective is lower than without it; both of the
        model that would be shipped.
        """
        with self.ship({}):
            without = self._value(held_out)
        with self.ship(deltas):
            after, value = held_out.losses(self.model), self._value(held_out)
        budget = self.config.search.max_utility_loss
        reason = objection(self.found.held_out_before, after, budget)
        if not (reason or value < without):
            was, now = told_apart(without, value)
            reason = f"the held-out objective went from {was} to {now} nats"
        accepted = not reason
        reason = reason or "the held-out objective is lower than with the vector alone"
        return TouchUp(accepted, reason, deltas, tuple(self.path), after)
