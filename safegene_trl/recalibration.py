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
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import nn

from .attach import LowRankDelta, attached, frozen_for_calibration, recomputing
from .calibration import Batch, CalibrationSet, batches
from .config import SafeGeneConfig
from .errors import RecalibrationError
from .optimization import minimize_in_box
from .sharding import Sharding
from .weights import base_model


SHRINK_STEPS = (1.0, 0.8, 0.6, 0.4, 0.2)
LIKELY_TOKENS = 16  # softened over the whole vocabulary, what never is an answer would outweigh what is
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
    """

    coefficients: dict[str, float]
    accepted: bool
    reason: str
    scale: float
    held_out_before: Losses
    held_out_after: Losses
    history: list[dict] = field(default_factory=list)


TERMS = ("utility", "safety", "benign")
Attach = Callable[[torch.Tensor], AbstractContextManager[None]]  # puts the vector on, with these coefficients


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
    ):
        splits = {"utility": data.task, "safety": data.harmful, "benign": data.benign}
        self.sharding, self.temperature = sharding, config.utility_temperature
        self.jobs: list[_Job] = []
        for term in TERMS:
            split = splits[term]
            group = batches(getattr(split, side), config.batch_size, pad_id, sharding.device) if split else []
            self.jobs += [_Job(term, batch, 1 / _tokens(group)) for batch in group]
        tasks = sum(job.term == "utility" for job in self.jobs)
        self.reference: dict[int, torch.Tensor] = {}
        with torch.no_grad(), sharding.forward_passes():
            for index in sharding.share(tasks):
                log_probs = F.log_softmax(response_logits(model, self.jobs[index or 0].batch)[0], dim=-1)
                if index is not None:  # on the CPU: tokens × vocabulary in float32 would crowd the accelerator
                    self.reference[index] = log_probs.cpu()
                sharding.release()

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
        with self.sharding.forward_passes(), recomputing(model):
            for index in self.sharding.share(len(self.jobs)):
                current = self._idle_job if index is None else index
                count = len(self.jobs[current].batch.input_ids)
                coefficients = torch.tensor(point, dtype=torch.float32, device=self.sharding.device)
                coefficients = coefficients.repeat(count, 1).requires_grad_()
                with attach(coefficients):
                    loss = self.loss(model, current, self.temperature)
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
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    coefficient_names: Mapping[str, Sequence[str]],
    data: CalibrationSet,
    config: SafeGeneConfig,
    pad_id: int,
    sharding: Sharding,
    on_evaluation: Callable[[dict], None] = lambda entry: None,
    carried: Mapping[str, float] | None = None,
    start: Mapping[str, float] | None = None,
) -> Recalibration:
    """Finds the coefficients of one fine-tune. The model is left exactly as it was.

    Where the model's weights hold `Σ carried·V` already, the coefficients and their bounds are still those of the whole vector, and
    the KL term's reference is the model as it is, λ = `carried`.

    Collective: every rank calls it with the same arguments and gets the same outcome, bit by bit; each works on its
    share of the batches.

    Args:
        model: The fine-tuned model, plain or PEFT-wrapped, unwrapped from any engine.
        deltas: The vector's low-rank deltas by canonical module name.
        coefficient_names: Names of the coefficients of every module's r rank-one parts; those of one name share it.
        data: Harmful, benign and task samples.
        config: Bounds, weights and budgets.
        pad_id: Token id to pad with.
        sharding: How the model is spread over ranks.
        on_evaluation: Called with each history entry, e.g. to move a progress bar.
        carried: By name, the coefficients with which the weights hold the vector. Default: 0.
        start: By name, where the search starts. Default: `carried`, else `config.start`.

    Raises:
        RecalibrationError: A loss is not finite.
    """
    names = list(dict.fromkeys(name for module in deltas for name in coefficient_names[module]))
    position = {name: index for index, name in enumerate(names)}
    index = {
        module: torch.tensor([position[name] for name in coefficient_names[module]], device=sharding.device)
        for module in deltas
    }
    held = np.array([(carried or {}).get(name, 0.0) for name in names])
    first = start or (carried if held.any() else dict.fromkeys(names, config.start)) or {}
    already = torch.tensor(held, dtype=torch.float32, device=sharding.device)

    def attach(coefficients: torch.Tensor) -> AbstractContextManager[None]:
        return attached(model, deltas, index, coefficients - already)

    with frozen_for_calibration(model):
        fit = Side(model, data, "fit", config, pad_id, sharding)
        held_out = Side(model, data, "held_out", config, pad_id, sharding)
        before = held_out.losses(model)
        point = np.array([first[name] for name in names]).clip(config.min_coefficient, config.max_coefficient)
        best, history = _search(model, fit, attach, config, names, point, on_evaluation)
        return _accept(model, held_out, attach, best, before, config, names, held, history)


def _search(
    model: nn.Module,
    fit: Side,
    attach: Attach,
    config: SafeGeneConfig,
    names: Sequence[str],
    start: np.ndarray,
    on_evaluation: Callable[[dict], None],
) -> tuple[np.ndarray, list[dict]]:
    """Rank 0 runs the optimiser and the others follow it, so that unlike machines cannot part ways."""
    history: list[dict] = []
    sharding = fit.sharding

    def evaluate(point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        value, losses, gradient, rows = objective(model, fit, attach, point, config)
        if not (math.isfinite(value) and np.isfinite(gradient).all()):
            raise RecalibrationError("The recalibration loss is not finite: check whether the fine-tune has diverged.")
        entry = {"objective": value, **losses.to_dict(), "coefficients": dict(zip(names, point.tolist(), strict=True))}
        history.append(entry)
        on_evaluation(entry)
        return value, gradient, rows

    ended = torch.zeros(1 + len(names), dtype=torch.float64)

    def tell(point: np.ndarray) -> np.ndarray:
        sharding.from_main(torch.cat((torch.ones(1), torch.as_tensor(point))))
        return point

    if sharding.is_main:
        minimize_in_box(
            lambda point: evaluate(tell(point)),
            start,
            config.min_coefficient,
            config.max_coefficient,
            config.max_evaluations,
        )
        sharding.from_main(ended)
    else:
        while (told := sharding.from_main(ended))[0]:
            evaluate(told[1:].numpy())
    best = min(history, key=lambda entry: entry["objective"])
    return np.array(list(best["coefficients"].values())), history


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


def _accept(
    model: nn.Module,
    held_out: Side,
    attach: Attach,
    best: np.ndarray,
    before: Losses,
    config: SafeGeneConfig,
    names: Sequence[str],
    carried: np.ndarray,
    history: list[dict],
) -> Recalibration:
    """Takes λ if held-out safety improves within the budgets, else the largest share of the way to it that does."""
    origin, failure, after = carried.clip(config.min_coefficient, config.max_coefficient), "", before
    for scale in SHRINK_STEPS:
        point = origin + scale * (best - origin)
        with attach(torch.tensor(point, dtype=torch.float32, device=held_out.sharding.device)):
            after = held_out.losses(model)
        objection = _objection(before, after, config.max_utility_loss)
        if not objection:
            reason = "Held-out safety improved within the utility budget."
            if failure:
                reason = f"Shrunk to {scale:.0%} of the found coefficients, because at full size {failure}."
            found = dict(zip(names, point.tolist(), strict=True))
            return Recalibration(found, True, reason, scale, before, after, history)
        failure = failure or objection
    unchanged = dict(zip(names, carried.tolist(), strict=True))
    return Recalibration(
        unchanged, False, f"No share of the found coefficients is acceptable: {failure}.", 0.0, before, after, history
    )


def _objection(before: Losses, after: Losses, budget: float) -> str:
    if not after.safety < before.safety:
        return f"the held-out safety loss went from {before.safety:.3f} to {after.safety:.3f} nats"
    if not after.utility <= budget:
        return f"the held-out task divergence is {after.utility:.3f} nats and the budget {budget}"
    if not after.benign <= before.benign + budget:
        return f"the held-out loss on benign prompts rose from {before.benign:.3f} to {after.benign:.3f} nats"
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
