"""The objective of the recalibration, and what every sample adds to its gradient.

SafeGene (arXiv 2606.06519) tunes only the scalar coefficients of the selected layers. The objective
here is

    min_λ  CE(refusal | harmful) + η·CE(answer | benign look-alike) + β·D(p_{λ=0} ‖ p_λ on task samples) + γ·Σλ,
    λ_min ≤ λ ≤ λ_max,

every term a mean over response tokens, in nats. `D` is the KL divergence and, with T > 1, beside it
`T²·KL` of the two distributions at temperature `T` (Hinton et al., arXiv 1503.02531) over the
likeliest tokens: a shift `b` of the log-odds of two answers is worth `p(1−p)b²/2` to the first,
nothing where the fine-tune is sure, and enough shifts of that kind tip those samples of which it is
not.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..config.settings import SafeGeneConfig
from ..data.calibration import CalibrationSet
from ..distributed.layouts import Sharding
from ..distributed.memory import free_bytes
from ..models.attachment import recomputing
from ..models.batch_size import ON_CPU
from ..models.inputs import Batch, batches
from ..models.losses import cross_entropy, divergence, response_logits


REFERENCE_SHARE = 0.05  # of a device's free memory, for one batch's reference
LEAST_DIVERGENCE = 1e-5  # nats of a sample: below, float32 tells it from 0 no more
TERMS = ("utility", "safety", "benign")
# puts the vector on, with these coefficients
Attach = Callable[[torch.Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class Losses:
    """Means over response tokens, in nats: CE on refusals, CE on benign answers, KL (in the search
    `D`) on task responses.
    """

    safety: float
    benign: float
    utility: float

    def to_dict(self) -> dict[str, float]:
        return {"safety": self.safety, "benign": self.benign, "utility": self.utility}


@dataclass(frozen=True)
class _Job:
    """One forward pass: a batch, the term its loss belongs to, and its weight there, 1 / tokens of
    the term.
    """

    term: str
    batch: Batch
    weight: float


@dataclass(frozen=True)
class SampleGradients:
    """What the samples add to one term.

    Attributes:
        weight: Of a sample in the term: the term's gradient is the weight times the sum of the
            samples'.
        losses: The samples' summed losses, in nats, shape (samples,), float64.
        gradients: Their gradients, samples×n, float64.
    """

    weight: float
    losses: np.ndarray
    gradients: np.ndarray


class Objective:
    """One side (fit or held-out) of a calibration set, its batches shared out over the ranks.

    Every batch's loss and every sample's gradient goes into a row of its own and the rows are added
    up in one order, so that the numbers do not depend on the number of ranks. Task batches come
    first: they need the fine-tuned model's log-probabilities before anything is attached to it.
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
        self.sharding, self.temperature = sharding, config.search.utility_temperature
        self.jobs: list[_Job] = []
        for term in TERMS:
            split = splits[term]
            group = batches(getattr(split, side), size, pad_id, sharding.device) if split else []
            self.jobs += [_Job(term, batch, 1 / _tokens(group)) for batch in group]
        tasks = sum(job.term == "utility" for job in self.jobs)
        self.reference: dict[int, torch.Tensor] = {}
        with torch.no_grad(), sharding.forward_passes():
            for index in sharding.share(tasks):
                log_probs = F.log_softmax(
                    response_logits(model, self.jobs[index or 0].batch)[0], dim=-1
                )
                if index is not None:
                    self.reference[index] = self._stored(log_probs)
                sharding.reshard()

    @staticmethod
    def _stored(log_probs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (tokens×vocabulary, float32) where they lie until the search ends: on
        the CPU if they crowd the device.
        """
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
            self.sharding.values(
                len(self.jobs), lambda index: self.loss(model, index).sum(), self._idle_job
            )
        )

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
        ends = list(
            itertools.accumulate((len(job.batch.input_ids) for job in self.jobs), initial=0)
        )
        sums, rows = (
            torch.zeros(ends[-1], dtype=torch.float64),
            torch.zeros(ends[-1], len(point), dtype=torch.float64),
        )
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
                self.sharding.reshard()
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
        return self._means(
            torch.stack([sums[a:b].sum() for a, b in itertools.pairwise(ends)])
        ), found

    def _means(self, sums: torch.Tensor) -> Losses:
        totals = dict.fromkeys(TERMS, 0.0)
        for job, value in zip(self.jobs, sums.tolist(), strict=True):
            totals[job.term] += job.weight * value
        return Losses(**totals)

    @property
    def _idle_job(self) -> int:
        """The job with which a rank without one marks time: the last, which needs no reference."""
        return len(self.jobs) - 1


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
    weights = {
        "safety": 1.0,
        "benign": config.search.benign_weight,
        "utility": config.search.utility_weight,
    }
    value = sum(weights[term] * loss for term, loss in losses.to_dict().items())
    value += config.search.sparsity_weight * float(point.sum())
    gradient, matrix = np.full(len(point), config.search.sparsity_weight), []
    for term, samples in terms.items():
        weight, rows = weights[term] * samples.weight, samples.gradients
        gradient += weight * rows.sum(axis=0)
        if term == "utility":
            rows = rows / np.sqrt(2 * samples.losses.clip(min=LEAST_DIVERGENCE))[:, None]
        matrix.append(np.sqrt(weight) * rows)
    return value, losses, gradient, np.concatenate(matrix)


def _tokens(group: Sequence[Batch]) -> int:
    return sum(int(batch.target_mask.sum()) for batch in group)
