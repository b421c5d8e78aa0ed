"""The objective of the recalibration, and what every sample adds to its gradient.

SafeGene (arXiv 2606.06519) tunes only the scalar coefficients of the selected layers. The objective
here is

    min_λ  KL(p_aligned ‖ p_λ on refusals of harmful prompts) + η·KL(p_aligned ‖ p_λ on answers to benign ones)
           + β·D(p_{λ=0} ‖ p_λ on task samples) + γ·Σλ,
    λ_min ≤ λ ≤ λ_max,

over the first tokens of the aligned model's own answers; among the benign ones are prompts near
the border, which it refuses. What it finds likely there comes with the
vector (`extraction/soft_targets.py`); where only its words do, as with data of the user's own, the
KL divergence is the cross-entropy, whose least value lies beyond the aligned model. Every term is a
mean over response tokens, in nats. `D` is the KL divergence and, with T > 1, beside it `T²·KL` of
the two distributions at temperature `T` (Hinton et al., arXiv 1503.02531) over the likeliest
tokens: a shift `b` of the log-odds of two answers is worth `p(1−p)b²/2` to the first, nothing where
the fine-tune is sure, and enough shifts of that kind tip those samples of which it is not.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ..config.settings import SafeGeneConfig
from ..data.calibration import CalibrationSet
from ..distributed.layouts import Sharding
from ..distributed.memory import free_bytes, has_own_memory
from ..models.attachment import recomputing
from ..models.batch_size import ON_CPU
from ..models.inputs import Batch, Sample, collate, tight_groups
from ..models.losses import sample_losses, stored_reference


REFERENCE_SHARE = 0.05  # of a device's free memory, for one batch's reference
LEAST_DIVERGENCE = 1e-5  # nats of a sample: below, float32 tells it from 0 no more
PASS_COST_ON_CPU = 150.0  # positions, measured; a GPU is idle in small passes
TERMS = ("utility", "safety", "benign")
Work = TypeVar("Work")
# puts the vector on, with these coefficients
Attach = Callable[[torch.Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class Losses:
    """Means over response tokens, in nats: KL from the aligned model on its refusals and on its
    benign answers (CE where only its words are known), KL (in the search `D`) on task responses.
    """

    safety: float
    benign: float
    utility: float

    def to_dict(self) -> dict[str, float]:
        return {"safety": self.safety, "benign": self.benign, "utility": self.utility}


@dataclass(frozen=True)
class Passes:
    """How samples are put through the model.

    Attributes:
        pad_id: Token id to pad with.
        batch_size: Most samples at once.
        keep_activations: Whether layers that the training recomputes in backward passes are not
            recomputed here.
    """

    pad_id: int
    batch_size: int = ON_CPU
    keep_activations: bool = False


@dataclass(frozen=True)
class _Job:
    """One forward pass: a batch, and the terms that its samples belong to."""

    batch: Batch
    terms: tuple[str, ...]
    divergences: tuple[bool, ...]

    @property
    def compared(self) -> int:
        """How many samples are held against the fine-tuned model: they come first."""
        return self.terms.count("utility")


@dataclass(frozen=True)
class SampleGradients:
    """What the samples add to one term.

    Attributes:
        weight: Of a sample in the term: the term's gradient is the weight times the sum of the
            samples'.
        losses: The samples' summed losses, in nats, shape (samples,), float64.
        gradients: Their gradients, samples×n, float64.
        divergences: Which of the losses are divergences, shape (samples,), bool.
    """

    weight: float
    losses: np.ndarray
    gradients: np.ndarray
    divergences: np.ndarray


class Objective:
    """One side (fit or held-out) of a calibration set, its batches shared out over the ranks.

    A batch may hold samples of all terms. Task samples come first, so that few batches hold some of
    them: their responses are longer than the few tokens of a refusal, and they need what the
    fine-tuned model says before anything is attached to it. After them, and among them, samples of
    like length stand together.

    Every sample's loss and gradient goes into a row of its own and the rows are added up in one
    order, so that the numbers do not depend on the number of ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        data: CalibrationSet,
        side: str,
        config: SafeGeneConfig,
        passes: Passes,
        sharding: Sharding,
    ):
        self._recomputing = nullcontext if passes.keep_activations else partial(recomputing, model)
        self.sharding, self.temperature = sharding, config.search.utility_temperature
        splits = {"utility": data.task, "safety": data.harmful, "benign": data.all_benign}
        by_term = {term: getattr(split, side) if split else [] for term, split in splits.items()}
        self.weights = {term: 1 / max(_tokens(own), 1) for term, own in by_term.items()}
        samples = [(sample, term) for term in TERMS for sample in by_term[term]]
        samples.sort(key=lambda each: (each[1] != "utility", len(each[0].input_ids)))
        self.jobs: list[_Job] = []
        cost = math.inf if has_own_memory(sharding.device) else PASS_COST_ON_CPU
        for group in tight_groups([sample for sample, _ in samples], passes.batch_size, cost):
            own, terms = zip(*samples[group], strict=True)
            divergences = tuple(
                term == "utility" or sample.soft is not None
                for sample, term in zip(own, terms, strict=True)
            )
            batch = collate(own, passes.pad_id, sharding.device)
            self.jobs.append(_Job(batch, terms, divergences))
        self.reference: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            self._share_out(
                sum(job.compared > 0 for job in self.jobs),
                lambda index: stored_reference(
                    model, self.jobs[index].batch, self.jobs[index].compared
                ),
                self._store,
            )

    def _share_out(
        self,
        count: int,
        work: Callable[[int], Work],
        keep: Callable[[int, Work], None],
    ) -> None:
        """Collective: `keep(i, work(i))` for those of the first `count` jobs that are this rank's.
        One without a job marks time with the last, for which it needs no reference.
        """
        with self.sharding.forward_passes():
            for index in self.sharding.share(count):
                found = work(len(self.jobs) - 1 if index is None else index)
                self.sharding.reshard()
                if index is not None:
                    keep(index, found)

    def _store(self, index: int, reference: torch.Tensor) -> None:
        """Where it lies until the search ends: on the CPU if it crowds the device."""
        crowded = reference.nbytes > REFERENCE_SHARE * free_bytes(reference.device)
        self.reference[index] = reference.cpu() if crowded else reference

    def loss(self, model: nn.Module, index: int, temperature: float = 1.0) -> torch.Tensor:
        """Every sample's summed loss in one of this rank's jobs."""
        return sample_losses(model, self.jobs[index].batch, self.reference.get(index), temperature)

    @torch.no_grad()
    def losses(self, model: nn.Module, temperature: float = 1.0) -> Losses:
        """The losses of the model as it is; `temperature` is that of the task's divergence."""
        sums, places = self._rows(), self._places()

        def keep(index: int, found: torch.Tensor) -> None:
            sums[places[index]] = found.double().cpu()

        self._share_out(len(self.jobs), lambda index: self.loss(model, index, temperature), keep)
        return self._means(self._by_term(self.sharding.sum(sums)))

    def gradients(
        self, model: nn.Module, attach: Attach, point: np.ndarray
    ) -> tuple[Losses, dict[str, SampleGradients]]:
        """The objective's losses with the vector on at `point`, and by term what every sample adds
        to its gradient.

        Args:
            model: The fine-tuned model.
            attach: Puts the vector on, with coefficients batch×n.
            point: The coefficients, shape `(n,)`.

        Returns:
            The losses, and the samples' gradients by term.
        """
        sums, rows, places = self._rows(), self._rows(len(point)), self._places()

        def work(index: int) -> tuple[torch.Tensor, torch.Tensor]:
            coefficients = torch.tensor(point, dtype=torch.float32, device=self.sharding.device)
            coefficients = coefficients.repeat(len(self.jobs[index].terms), 1).requires_grad_()
            with attach(coefficients):
                loss = self.loss(model, index, self.temperature)
                # without a graph no hook has acted, of which the attachment's evidence tells
                gradient = torch.zeros_like(coefficients)
                if loss.requires_grad:
                    (gradient,) = torch.autograd.grad(loss.sum(), coefficients)
            return loss.detach(), gradient

        def keep(index: int, found: tuple[torch.Tensor, torch.Tensor]) -> None:
            sums[places[index]], rows[places[index]] = (each.double().cpu() for each in found)

        with self._recomputing():
            self._share_out(len(self.jobs), work, keep)
        losses = self._by_term(self.sharding.sum(sums))
        gradients = self._by_term(self.sharding.sum(rows))
        divergences = self._by_term(torch.tensor([d for job in self.jobs for d in job.divergences]))
        return self._means(losses), {
            term: SampleGradients(
                self.weights[term], losses[term], gradients[term], divergences[term]
            )
            for term in TERMS
        }

    def gradient_by(
        self, model: nn.Module, parameters: Sequence[torch.Tensor], weights: Mapping[str, float]
    ) -> tuple[float, torch.Tensor]:
        """The objective's value, and its gradient by all numbers of some tensors, one after another:
        float32, on the CPU, the same on every rank.

        Args:
            model: The model, which they act on already.
            parameters: The tensors, float32, all on this rank's device.
            weights: Of the terms.
        """
        of_samples = {term: weights[term] * self.weights[term] for term in TERMS}
        # what goes backward is no smaller than one sample's own loss: float16 would lose it
        largest = max(of_samples.values())
        total, value = [torch.zeros_like(each) for each in parameters], torch.zeros(1)

        def work(index: int) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
            losses = self.loss(model, index, self.temperature)
            shares = [of_samples[term] / largest for term in self.jobs[index].terms]
            loss = (losses * torch.tensor(shares, device=losses.device)).sum()
            if not loss.requires_grad:  # no sample was sent to any of their modules
                return loss, total[:0]
            found = torch.autograd.grad(loss, parameters, materialize_grads=True)
            return loss.detach(), found

        def keep(index: int, found: tuple[torch.Tensor, Sequence[torch.Tensor]]) -> None:
            value.add_(found[0].float().cpu())
            for whole, own in zip(total, found[1], strict=False):
                whole.add_(own)

        with self._recomputing():
            self._share_out(len(self.jobs), work, keep)
        parts = [value.to(self.sharding.device), *(each.flatten() for each in total)]
        summed = self.sharding.sum(torch.cat(parts)) * largest
        return float(summed[0]), summed[1:]

    def _rows(self, *width: int) -> torch.Tensor:
        """Zeros for every sample."""
        count = sum(len(job.terms) for job in self.jobs)
        return torch.zeros(count, *width, dtype=torch.float64)

    def _places(self) -> list[slice]:
        """Each job's samples among all."""
        ends = itertools.accumulate((len(job.terms) for job in self.jobs), initial=0)
        return list(itertools.starmap(slice, itertools.pairwise(ends)))

    def _by_term(self, rows: torch.Tensor) -> dict[str, np.ndarray]:
        terms = np.array([term for job in self.jobs for term in job.terms])
        return {term: rows.numpy()[terms == term] for term in TERMS}

    def _means(self, losses: dict[str, np.ndarray]) -> Losses:
        return Losses(
            **{term: self.weights[term] * float(own.sum()) for term, own in losses.items()}
        )


def term_weights(config: SafeGeneConfig) -> dict[str, float]:
    """Of the objective's terms."""
    return {
        "safety": 1.0,
        "benign": config.search.benign_weight,
        "utility": config.search.utility_weight,
    }


def evaluate_objective(
    model: nn.Module,
    fit: Objective,
    attach: Attach,
    point: np.ndarray,
    config: SafeGeneConfig,
) -> tuple[float, Losses, np.ndarray, np.ndarray]:
    """The objective at `point`, its losses, its gradient `(n,)` and its Gauss–Newton matrix `RᵀR`
    as the rows `R`, one per sample (samples×n); one batch's graph lives at a time.

    With `g_i` the gradient of sample i's negative log-likelihood the matrix is `Σ w_i g_i g_iᵀ`, an
    estimate of Fisher's. A divergence `k_i` has its minimum, 0, where nothing is added: it is half
    the square of a residual `√(2 k_i)`, whose matrix is `Σ w_i g_i g_iᵀ / 2 k_i`, exact along the
    line to that minimum while `k_i` is quadratic.
    """
    losses, terms = fit.gradients(model, attach, point)
    weights = term_weights(config)
    value = sum(weights[term] * loss for term, loss in losses.to_dict().items())
    value += config.search.sparsity_weight * float(point.sum())
    gradient, matrix = np.full(len(point), config.search.sparsity_weight), []
    for term, samples in terms.items():
        weight, rows = weights[term] * samples.weight, samples.gradients
        gradient += weight * rows.sum(axis=0)
        scale = np.sqrt(2 * samples.losses.clip(min=LEAST_DIVERGENCE))
        rows = rows / np.where(samples.divergences, scale, 1.0)[:, None]
        matrix.append(np.sqrt(weight) * rows)
    return value, losses, gradient, np.concatenate(matrix)


def _tokens(samples: Sequence[Sample]) -> int:
    """Response tokens that are predicted from one before them."""
    return sum(sum(sample.is_response[1:]) for sample in samples)
