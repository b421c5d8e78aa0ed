"""Few-shot recalibration: the coefficients λ with which one fine-tune takes on its family's safety vector.

SafeGene (arXiv 2606.06519) tunes only the scalar coefficients of the selected layers. The objective here is

    min_λ  CE(refusal | harmful) + η·CE(answer | benign look-alike) + β·D(p_{λ=0} ‖ p_λ on task samples) + γ·Σλ,
    λ_min ≤ λ ≤ λ_max,

every term a mean over response tokens, in nats. `D` is the KL divergence and, with T > 1, beside it `T²·KL` of the two distributions at temperature
`T` (Hinton et al., arXiv 1503.02531) over the likeliest tokens: a shift `b` of the log-odds of two answers is worth `p(1−p)b²/2` to the
first, nothing where the fine-tune is sure, and enough shifts of that kind tip those samples of which it is not.

It has as many unknowns as layers or modules and is smooth and deterministic. The
gradients of the single samples, which come with one backward pass, give a Gauss–Newton matrix to start from, and `optimization.py` solves it in
five to eight evaluations without a learning rate.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..config.settings import SafeGeneConfig
from ..data.calibration import CalibrationSet
from ..distributed.layouts import Sharding
from ..distributed.memory import free_bytes, has_own_memory
from ..errors import RecalibrationError
from ..models.attachment import VectorAttachment, frozen_for_calibration, recomputed_layers, recomputing
from ..models.batch_size import ON_CPU, fitting, halving
from ..models.inputs import Batch, batches
from ..models.parameters import base_model
from ..models.verification import Evidence
from .trust_region import minimize_in_box


SHRINK_STEPS = (1.0, 0.8, 0.6, 0.4, 0.2)
LIKELY_TOKENS = 16  # softened over the whole vocabulary, what never is an answer would outweigh what is
REFERENCE_SHARE = 0.05  # of a device's free memory, for one batch's reference
LEAST_DIVERGENCE = 1e-5  # nats of a sample: below, float32 tells it from 0 no more


@dataclass(frozen=True)
class Losses:
    """Means over response tokens, in nats: CE on refusals, CE on benign answers, KL (in the search `D`) on task responses."""

    safety: float
    benign: float
    utility: float

    def to_dict(self) -> dict[str, float]:
        return {"safety": self.safety, "benign": self.benign, "utility": self.utility}


@dataclass
class Recalibration:
    """The outcome of one recalibration.

    Attributes:
        coefficients: λ by coefficient name; 0 where the search left a layer out, and those carried where none are accepted.
        accepted: Whether held-out safety improved within the utility budget.
        reason: Why it was accepted, shrunk or rejected, in one sentence.
        scale: The share of the found λ that was kept (1 unless shrunk towards the lower bound).
        held_out_before: Held-out losses of the fine-tuned model.
        held_out_after: Held-out losses with the accepted (or last tried) coefficients.
        history: One entry per evaluation: objective, losses and coefficients.
        untouched: Names of coefficients that no sample reached: they stay what the weights carry.
        passes: How the passes were made: size of the batches, and what stayed in memory between them.
    """

    coefficients: dict[str, float]
    accepted: bool
    reason: str
    scale: float
    held_out_before: Losses
    held_out_after: Losses
    history: list[dict] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    passes: dict[str, Any] = field(default_factory=dict, compare=False)  # not what was found, but how


TERMS = ("utility", "safety", "benign")
Attach = Callable[[torch.Tensor], AbstractContextManager[None]]  # puts the vector on, with these coefficients
Ship = Callable[[np.ndarray], AbstractContextManager[None]]  # makes the model what is shipped with them, shape `(n,)`


@dataclass(frozen=True)
class _Job:
    """One forward pass: a batch, the term its loss belongs to, and its weight there, 1 / tokens of the term."""

    term: str
    batch: Batch
    weight: float


@dataclass(frozen=True)
class SampleGradients:
    """What the samples add to one term.

    Attributes:
        weight: Of a sample in the term: the term's gradient is the weight times the sum of the samples'.
        losses: The samples' summed losses, in nats, shape (samples,), float64.
        gradients: Their gradients, samples×n, float64.
    """

    weight: float
    losses: np.ndarray
    gradients: np.ndarray


class Side:
    """One side (fit or held-out) of a calibration set, its batches shared out over the ranks.

    Every batch's loss and every sample's gradient goes into a row of its own and the rows are added up in one order, so
    that the numbers do not depend on the number of ranks. Task batches come first: they need the fine-tuned model's
    log-probabilities before anything is attached to it.
    """

    def __init__(
        self,
        model: nn.Module,
        data: CalibrationSet,
        side: str,
        config: SafeGeneConfig,
        pad_id: int,
        sharding: Sharding,
        batch_size: int | None = None,
        keep_activations: bool = False,
    ):
        self._recomputing = nullcontext if keep_activations else partial(recomputing, model)
        size = batch_size or config.batch_size or ON_CPU
        splits = {"utility": data.task, "safety": data.harmful, "benign": data.benign}
        self.sharding, self.temperature = sharding, config.utility_temperature
        self.jobs: list[_Job] = []
        for term in TERMS:
            split = splits[term]
            group = batches(getattr(split, side), size, pad_id, sharding.device) if split else []
            self.jobs += [_Job(term, batch, 1 / _tokens(group)) for batch in group]
        tasks = sum(job.term == "utility" for job in self.jobs)
        self.reference: dict[int, torch.Tensor] = {}
        with torch.no_grad(), sharding.forward_passes():
            for index in sharding.share(tasks):
                log_probs = F.log_softmax(response_logits(model, self.jobs[index or 0].batch)[0], dim=-1)
                if index is not None:
                    self.reference[index] = self._stored(log_probs)
                sharding.release()

    @staticmethod
    def _stored(log_probs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (tokens×vocabulary, float32) where they lie until the search ends: on the CPU if they crowd the device."""
        crowded = log_probs.nbytes > REFERENCE_SHARE * free_bytes(log_probs.device)
        return log_probs.cpu() if crowded else log_probs

    def loss(self, model: nn.Module, index: int, temperature: float = 1.0) -> torch.Tensor:
        """Every sample's summed loss in one of this rank's jobs."""
        job = self.jobs[index]
        if index in self.reference:
            return divergence(model, job.batch, self.reference[index], temperature)
        return cross_entropy(model, job.batch)

    @torch.no_grad()
    def losses(self, model: nn.Module) -> Losses:
        """The losses of the model as it is."""
        return self._means(
            self.sharding.values(len(self.jobs), lambda index: self.loss(model, index).sum(), self._idle_job)
        )

    def gradients(
        self, model: nn.Module, attach: Attach, point: np.ndarray
    ) -> tuple[Losses, dict[str, SampleGradients]]:
        """The objective's losses with the vector on at `point`, and by term what every sample adds to its gradient.

        Args:
            model: The fine-tuned model.
            attach: Puts the vector on, with coefficients batch×n.
            point: The coefficients, shape `(n,)`.

        Returns:
            The losses, and the samples' gradients by term.
        """
        ends = list(itertools.accumulate((len(job.batch.input_ids) for job in self.jobs), initial=0))
        sums, rows = torch.zeros(ends[-1], dtype=torch.float64), torch.zeros(ends[-1], len(point), dtype=torch.float64)
        with self.sharding.forward_passes(), self._recomputing():
            for index in self.sharding.share(len(self.jobs)):
                current = self._idle_job if index is None else index
                count = len(self.jobs[current].batch.input_ids)
                coefficients = torch.tensor(point, dtype=torch.float32, device=self.sharding.device)
                coefficients = coefficients.repeat(count, 1).requires_grad_()
                with attach(coefficients):
                    loss = self.loss(model, current, self.temperature)
                    # without a graph no hook has acted, of which the attachment's evidence tells
                    gradient = torch.zeros_like(coefficients)
                    if loss.requires_grad:
                        (gradient,) = torch.autograd.grad(loss.sum(), coefficients)
                self.sharding.release()
                if index is not None:
                    own = slice(ends[index], ends[index + 1])
                    sums[own], rows[own] = loss.detach().double().cpu(), gradient.double().cpu()
        sums, rows = self.sharding.sum(sums), self.sharding.sum(rows)
        found = {}
        for term in TERMS:
            jobs = [index for index, job in enumerate(self.jobs) if job.term == term]
            samples = [place for index in jobs for place in range(ends[index], ends[index + 1])]
            weight = self.jobs[jobs[0]].weight if jobs else 0.0
            found[term] = SampleGradients(weight, sums[samples].numpy(), rows[samples].numpy())
        return self._means(torch.stack([sums[a:b].sum() for a, b in itertools.pairwise(ends)])), found

    def _means(self, sums: torch.Tensor) -> Losses:
        totals = dict.fromkeys(TERMS, 0.0)
        for job, value in zip(self.jobs, sums.tolist(), strict=True):
            totals[job.term] += job.weight * value
        return Losses(**totals)

    @property
    def _idle_job(self) -> int:
        """The job with which a rank without one marks time: the last, which needs no reference."""
        return len(self.jobs) - 1


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

    Where the model's weights hold `Σ carried·V` already, the coefficients and their bounds are still those of the whole vector, and
    the KL term's reference is the model as it is, λ = `carried`.

    Collective: every rank calls it with the same arguments and gets the same outcome, bit by bit; each works on its
    share of the batches. Where memory runs out it starts again with smaller batches.

    Args:
        attachment: The vector on the fine-tuned model.
        data: Harmful, benign and task samples.
        config: Bounds, weights and budgets.
        pad_id: Token id to pad with.
        on_evaluation: Called with each history entry, e.g. to move a progress bar.
        start: By name, where the search starts. Default: what is carried, else `config.start`.
        ship: Makes the model the one that would be shipped, which is accepted or not. Default: the vector is attached.

    Raises:
        RecalibrationError: A loss is not finite.
        UnsupportedModelError: The model's forward pass goes around one of the vector's modules.
        MemoryShortageError: Memory runs out with one sample at a time.
    """
    search = _Search(attachment, data, config, pad_id, on_evaluation, start, ship)
    size = _batch_size(attachment, data, config)
    search.roomy = size if config.batch_size is None and has_own_memory(attachment.sharding.device) else None
    try:
        found = halving(size, search.run, attachment.sharding)
        found.passes |= {"first_batch_size": size, "batch_size_set": config.batch_size is not None}
        found.passes |= {"factors": attachment.factors.describe()}
        return found
    finally:
        attachment.factors.release()


def _batch_size(attachment: VectorAttachment, data: CalibrationSet, config: SafeGeneConfig) -> int:
    splits = [split for split in (data.task, data.harmful, data.benign) if split]
    samples = [sample for split in splits for sample in (*split.fit, *split.held_out)]
    tokens = max(len(sample.input_ids) for sample in samples)
    responses = max(sum(sample.is_response) for sample in samples)
    return fitting(config.batch_size, base_model(attachment.model), tokens, responses, attachment.sharding)


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
        self.model, self.sharding, self.names = attachment.model, attachment.sharding, attachment.space.names
        self.on_evaluation, self.ship = on_evaluation, ship or self._attach
        self.held = np.array([attachment.carried[name] for name in self.names])
        first = start or (attachment.carried if self.held.any() else dict.fromkeys(self.names, config.start))
        low, high = config.min_coefficient, config.max_coefficient
        self.start = np.array([first[name] for name in self.names]).clip(low, high)
        self.history: list[dict] = []
        self.touched = np.zeros(len(self.names), dtype=bool)
        self.roomy: int | None = None  # batch size for which there is memory without gradient checkpointing

    def _attach(self, point: np.ndarray) -> AbstractContextManager[None]:
        values = torch.tensor(point, dtype=torch.float32, device=self.sharding.device)
        return self.attachment.applied(values)

    def run(self, batch_size: int) -> Recalibration:
        self.history, self.touched = [], np.zeros(len(self.names), dtype=bool)
        self.attachment.evidence = Evidence()
        with frozen_for_calibration(self.model):
            keep = batch_size == self.roomy
            fit, held_out = (
                Side(self.model, self.data, side, self.config, self.pad_id, self.sharding, batch_size, keep)
                for side in ("fit", "held_out")
            )
            before = held_out.losses(self.model)
            if not all(map(math.isfinite, before.to_dict().values())):
                raise RecalibrationError(
                    "The fine-tune has diverged: its losses are not finite before anything is added to it. Train it again, "
                    "with a lower learning rate or in float32."
                )
            best = self._minimize(fit)
            found = self._accept(held_out, best, before)
            recomputed = not keep and bool(recomputed_layers(self.model))
            found.passes = {"batch_size": batch_size, "activations": "recomputed" if recomputed else "kept"}
            return found

    def _minimize(self, fit: Side) -> np.ndarray:
        """Rank 0 runs the optimiser and the others follow it, so that unlike machines cannot part ways."""
        length = 1 + len(self.names)
        if not self.sharding.is_main:
            while (told := self.sharding.from_main(torch.zeros(length, dtype=torch.float64)))[0] == _EVALUATE:
                self._evaluate(fit, told[1:].numpy())
            if told[0] == _FAILED:
                with self.sharding.agreed():
                    pass
            return self._best()
        together = False

        def evaluate(point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            nonlocal together
            together = True  # what fails from here on fails on every rank
            self.sharding.from_main(
                torch.cat((torch.tensor([_EVALUATE], dtype=torch.float64), torch.as_tensor(point)))
            )
            found = self._evaluate(fit, point)
            together = False
            self.on_evaluation(self.history[-1])
            return found

        config, message = self.config, torch.zeros(length, dtype=torch.float64)
        try:
            minimize_in_box(
                evaluate, self.start, config.min_coefficient, config.max_coefficient, config.max_evaluations
            )
        except BaseException as error:
            if not together:
                message[0] = _FAILED
                self.sharding.from_main(message)
                known = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
                with suppress(Exception), self.sharding.agreed():
                    raise known from None
            raise
        self.sharding.from_main(message)
        return self._best()

    def _evaluate(self, fit: Side, point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        value, losses, gradient, rows = objective(self.model, fit, self.attachment.applied, point, self.config)
        if not self.history:
            self.attachment.check_effective()
        if not (math.isfinite(value) and np.isfinite(gradient).all()):
            raise RecalibrationError(
                "The recalibration loss is not finite with the safety vector on: make the vector again, or lower "
                "`max_coefficient`."
            )
        self.touched |= (rows != 0).any(axis=0)
        named = dict(zip(self.names, point.tolist(), strict=True))
        self.history.append({"objective": value, **losses.to_dict(), "coefficients": named})
        return value, gradient, rows

    def _best(self) -> np.ndarray:
        """The best point; a coefficient that no sample reached, of an expert that none was routed to, stays as it is carried."""
        best = min(self.history, key=lambda entry: entry["objective"])
        return np.where(self.touched, list(best["coefficients"].values()), self.held)

    def _accept(self, held_out: Side, best: np.ndarray, before: Losses) -> Recalibration:
        """Takes λ if held-out safety improves within the budgets, else the largest share of the way to it that does."""
        config, failure, after = self.config, "", before
        origin = self.held.clip(config.min_coefficient, config.max_coefficient)
        untouched = [name for name, reached in zip(self.names, self.touched, strict=True) if not reached]
        for scale in SHRINK_STEPS:
            point = np.where(self.touched, origin + scale * (best - origin), self.held)
            with self.ship(point):
                after = held_out.losses(self.model)
            objection = _objection(before, after, config.max_utility_loss)
            if not objection:
                reason = "Held-out safety improved within the utility budget."
                if failure:
                    reason = f"Shrunk to {scale:.0%} of the found coefficients, because at full size {failure}."
                found = self.attachment.space.named(point.tolist())
                return Recalibration(found, True, reason, scale, before, after, self.history, untouched)
            failure = failure or objection
        reason = f"No share of the found coefficients is acceptable: {failure}."
        carried = dict(self.attachment.carried)
        return Recalibration(carried, False, reason, 0.0, before, after, self.history, untouched)


_EVALUATE, _ENDED, _FAILED = 1.0, 0.0, -1.0  # what rank 0 tells the others


def objective(
    model: nn.Module,
    fit: Side,
    attach: Attach,
    point: np.ndarray,
    config: SafeGeneConfig,
) -> tuple[float, Losses, np.ndarray, np.ndarray]:
    """The objective at `point`, its losses, its gradient `(n,)` and its Gauss–Newton matrix `RᵀR` as the rows `R`, one per sample
    (samples×n); one batch's graph lives at a time.

    With `g_i` the gradient of sample i's negative log-likelihood the matrix is `Σ w_i g_i g_iᵀ`, an estimate of Fisher's. A divergence
    `k_i` has its minimum, 0, where nothing is added: it is half the square of a residual `√(2 k_i)`, whose matrix is
    `Σ w_i g_i g_iᵀ / 2 k_i`, exact along the line to that minimum while `k_i` is quadratic.
    """
    losses, terms = fit.gradients(model, attach, point)
    weights = {"safety": 1.0, "benign": config.benign_weight, "utility": config.utility_weight}
    value = sum(weights[term] * loss for term, loss in losses.to_dict().items())
    value += config.sparsity_weight * float(point.sum())
    gradient, matrix = np.full(len(point), config.sparsity_weight), []
    for term, samples in terms.items():
        weight, rows = weights[term] * samples.weight, samples.gradients
        gradient += weight * rows.sum(axis=0)
        if term == "utility":
            rows = rows / np.sqrt(2 * samples.losses.clip(min=LEAST_DIVERGENCE))[:, None]
        matrix.append(np.sqrt(weight) * rows)
    return value, losses, gradient, np.concatenate(matrix)


def _objection(before: Losses, after: Losses, budget: float) -> str:
    if not after.safety < before.safety:
        return f"the held-out safety loss went from {before.safety:.3f} to {after.safety:.3f} nats"
    if not after.utility <= budget:
        return f"the held-out task divergence is {after.utility:.3f} nats and the budget {budget} (`max_utility_loss`)"
    if not after.benign <= before.benign + budget:
        return (
            f"the held-out loss on benign prompts rose from {before.benign:.3f} to {after.benign:.3f} nats, more than the "
            f"budget {budget} (`max_utility_loss`) allows"
        )
    return ""


def cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Every sample's summed cross-entropy of its response tokens, in nats, float32 of shape (batch,)."""
    logits, next_ids = response_logits(model, batch)
    return _by_sample(F.cross_entropy(logits, next_ids, reduction="none"), batch)


def divergence(model: nn.Module, batch: Batch, reference: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Every sample's summed `KL(reference ‖ model)` over its response tokens, in nats, float32 of shape (batch,).

    Above 1 a `temperature` T adds `T²·KL` of both at T, over the reference's likeliest tokens (arXiv 1503.02531).

    `reference`: log-probabilities, tokens×vocabulary.
    """
    log_probs = F.log_softmax(response_logits(model, batch)[0], dim=-1)
    reference = reference.to(log_probs.device)
    terms = _kl(reference, log_probs)
    if temperature > 1:
        likely = reference.topk(min(LIKELY_TOKENS, reference.shape[-1])).indices
        terms = terms + temperature**2 * _kl(*(_softened(p, likely, temperature) for p in (reference, log_probs)))
    return _by_sample(terms, batch)


def _kl(reference: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_probs, reference, reduction="none", log_target=True).sum(dim=-1)


def _softened(log_probs: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.log_softmax(log_probs.gather(-1, tokens) / temperature, dim=-1)


def _by_sample(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sums over each sample's response tokens of what there is for all of them, in `response_logits`' order."""
    mask = batch.target_mask[:, -batch.kept :]
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(dim=1)  # adds in one order on every device


def response_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits (tokens×vocabulary) that predict the response tokens, and those tokens' ids.

    `model` may also be the engine or wrapper that a trainer trains it through.
    """
    architecture = type(base_model(extract_model_from_parallel(model)))
    accepted = inspect.signature(architecture.forward).parameters  # the instance's own may be wrapped
    extras = {"position_ids": batch.position_ids, "logits_to_keep": batch.kept}
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        **{name: value for name, value in extras.items() if name in accepted},
    )
    mask = batch.target_mask[:, -batch.kept :]
    next_ids = batch.input_ids.roll(-1, dims=1)[:, -batch.kept :]
    return output.logits[:, -batch.kept :][mask].float(), next_ids[mask]


def _tokens(group: Sequence[Batch]) -> int:
    return sum(int(batch.target_mask.sum()) for batch in group)
