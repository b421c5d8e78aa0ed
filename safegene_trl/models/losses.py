"""What a model's answers to samples are worth: losses of the response tokens, in nats.

Logits are the largest tensors of a pass: tokens × vocabulary. Losses are worked out of a chunk of
them at a time, so that beside the model's own logits and their gradient, which are of its own data
type, no more than a chunk's worth of float32 is ever in memory.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import nn

from .inputs import Batch
from .parameters import base_model


LIKELY_TOKENS = (
    16  # softened over the whole vocabulary, what never is an answer would outweigh what is
)
# Bytes of float32 logits at a time. What a divergence and its gradient make of them is some eight
# times as much: 256 MiB.
CHUNK = 2**25
LEAST_LOG_PROB = -100.0  # nats; its probability is 0 in float32
LEAST_REST = 1e-6  # of a distribution: float32 sums tell less from 0 no more
# losses (tokens,) of some of the response tokens, from their float32 logits (tokens×vocabulary)
_TokenLosses = Callable[[torch.Tensor, slice], torch.Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Every sample's summed cross-entropy of its response tokens, in nats, float32 of shape
    (batch,).
    """
    return sample_losses(model, batch)


def divergence(
    model: nn.Module, batch: Batch, reference: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Every sample's summed `KL(reference ‖ model)` over its response tokens, in nats, float32 of
    shape (batch,).

    Above 1 a `temperature` T adds `T²·KL` of both at T, over the reference's likeliest tokens
    (arXiv 1503.02531).

    `reference`: log-probabilities, tokens×vocabulary, float32.
    """
    return sample_losses(model, batch, reference, temperature)


def sample_losses(
    model: nn.Module,
    batch: Batch,
    reference: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Every sample's summed loss over its response tokens, in nats, float32 of shape (batch,): the
    divergence of the samples that have a reference, which come first, and the others'
    cross-entropy.

    Args:
        model: May be the engine or wrapper that a trainer trains it through.
        batch: Samples with a reference, then those without.
        reference: As `stored_reference` gives it, tokens×vocabulary, on any device, of all response
            tokens of the first samples.
        temperature: Of the divergence.
    """
    logits, ids = _forward(model, batch), _next_ids(batch)
    compared = 0 if reference is None else len(reference)
    targets = _Targets(ids, reference, temperature, batch.soft_ids, batch.soft_log_probs)
    losses = partial(_token_losses, targets)
    parts = _parts(len(ids), compared, logits.shape[-1])
    if len(ids) * logits.shape[-1] * 4 <= CHUNK:
        chosen = _chosen(logits, batch).float()
        pieces = chosen.split([p.stop - p.start for p in parts]) if len(parts) > 1 else [chosen]
        found = [losses(piece, part) for piece, part in zip(pieces, parts, strict=True)]
        values = torch.cat(found) if len(found) > 1 else found[0]
    else:
        rows, columns = batch.target_mask[:, -batch.kept :].nonzero(as_tuple=True)
        places = (rows + 1) * logits.shape[1] - batch.kept + columns
        values = _InChunks.apply(logits.flatten(0, 1), places, losses, parts)
    return _by_sample(values, batch)


def stored_reference(model: nn.Module, batch: Batch, samples: int) -> torch.Tensor:
    """What the model says to the response tokens of the first samples of a batch, tokens×vocabulary,
    as it is kept for `sample_losses`: logits of 16 bits as they are, which are half of float32 and
    exact, else log-probabilities.
    """
    tokens = int(batch.target_mask[:samples].sum())
    logits = _chosen(_forward(model, batch), batch)[:tokens]
    return logits.clone() if logits.dtype.itemsize == 2 else F.log_softmax(logits.float(), dim=-1)


def _log_probs(reference: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(reference.float(), dim=-1) if reference.dtype.itemsize == 2 else reference


@dataclass(frozen=True)
class _Targets:
    """What the response tokens of a batch are held against."""

    next_ids: torch.Tensor
    reference: torch.Tensor | None
    temperature: float
    soft_ids: torch.Tensor | None
    soft_log_probs: torch.Tensor | None


def _token_losses(targets: _Targets, logits: torch.Tensor, tokens: slice) -> torch.Tensor:
    """`tokens`: all of them have a reference, or none has."""
    reference, temperature = targets.reference, targets.temperature
    if reference is None or tokens.start >= len(reference):
        if targets.soft_ids is None or targets.soft_log_probs is None:
            return F.cross_entropy(logits, targets.next_ids[tokens], reduction="none")
        return _soft_divergence(logits, targets.soft_ids[tokens], targets.soft_log_probs[tokens])
    log_probs = F.log_softmax(logits, dim=-1)
    before = _log_probs(reference[tokens].to(logits.device))
    terms = _kl(before, log_probs)
    if temperature > 1:
        likely = before.topk(min(LIKELY_TOKENS, before.shape[-1])).indices
        terms = terms + temperature**2 * _kl(
            *(_softened(p, likely, temperature) for p in (before, log_probs))
        )
    return terms


def _soft_divergence(
    logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor
) -> torch.Tensor:
    """`KL(p ‖ q)` of every token's place, in nats, (tokens,): over p's likeliest tokens and all others
    as one, which is at most the divergence over the whole vocabulary.

    Args:
        logits: Of q, tokens×vocabulary, float32.
        ids: p's likeliest tokens, tokens×m.
        log_probs: Their log-probabilities in p; minus infinity fills up.
    """
    own = F.log_softmax(logits, dim=-1)
    others = own.scatter(-1, ids, -math.inf).logsumexp(dim=-1)
    known = log_probs.clamp(min=LEAST_LOG_PROB)
    terms = (known.exp() * (known - own.gather(-1, ids))).sum(dim=-1)
    rest = 1 - log_probs.exp().sum(dim=-1)
    seen = (rest > LEAST_REST) & others.isfinite()  # there are no others of a whole vocabulary
    rest = rest.where(seen, 1.0)
    return terms + rest * (rest.log() - others.where(seen, 0.0))


def _kl(reference: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_probs, reference, reduction="none", log_target=True).sum(dim=-1)


def _softened(log_probs: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.log_softmax(log_probs.gather(-1, tokens) / temperature, dim=-1)


def _parts(tokens: int, compared: int, vocabulary: int) -> list[slice]:
    """Cuts of `tokens` response tokens into chunks, none of which has tokens with a reference (the
    first `compared`) and without.
    """
    most = max(CHUNK // (4 * vocabulary), 1)
    edges = {*range(0, compared, most), *range(compared, tokens, most), tokens}
    return list(itertools.starmap(slice, itertools.pairwise(sorted(edges))))


class _InChunks(torch.autograd.Function):
    """Losses (tokens,) of the logits (positions×vocabulary) at `places`, chunk by chunk.

    The backward pass works every chunk out again, so that nothing of the logits' size is kept for
    it but the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        places: torch.Tensor,
        losses: _TokenLosses,
        parts: Sequence[slice],
    ) -> torch.Tensor:
        ctx.save_for_backward(logits, places)
        ctx.losses, ctx.parts = losses, parts
        return torch.cat([losses(logits[places[part]].float(), part) for part in parts])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        logits, places = ctx.saved_tensors
        found = torch.zeros_like(logits)
        for part in ctx.parts:
            with torch.enable_grad():
                chunk = logits[places[part]].float().requires_grad_()
                (own,) = torch.autograd.grad(ctx.losses(chunk, part), chunk, gradients[0][part])
            found[places[part]] = own.to(found.dtype)
        return found, None, None, None


def _by_sample(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sums over each sample's response tokens of what there is for all of them, in
    `response_logits`' order.
    """
    mask = batch.target_mask[:, -batch.kept :]
    # adds in one order on every device
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(dim=1)


def response_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits (tokens×vocabulary) that predict the response tokens, and those tokens' ids.

    `model` may also be the engine or wrapper that a trainer trains it through.
    """
    return _chosen(_forward(model, batch), batch).float(), _next_ids(batch)


def likeliest_tokens(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that the model finds most likely in the response tokens' places, and those tokens'
    ids.

    They are looked up in the model's own logits, of which no copy is made. Of equal ones the first
    counts, in every data type.
    """
    likeliest = _forward(model, batch)[:, -batch.kept :].argmax(dim=-1)
    return likeliest[batch.target_mask[:, -batch.kept :]], _next_ids(batch)


def _forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of the last positions, or of all: batch×positions×vocabulary, in the model's type."""
    architecture = type(base_model(extract_model_from_parallel(model)))
    accepted = inspect.signature(
        architecture.forward
    ).parameters  # the instance's own may be wrapped
    extras = {"position_ids": batch.position_ids, "logits_to_keep": batch.kept}
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        **{name: value for name, value in extras.items() if name in accepted},
    )
    return output.logits


def _chosen(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Those that predict response tokens, tokens×vocabulary."""
    return logits[:, -batch.kept :][batch.target_mask[:, -batch.kept :]]


def _next_ids(batch: Batch) -> torch.Tensor:
    """The response tokens, in the order of `_chosen`."""
    mask = batch.target_mask[:, -batch.kept :]
    return batch.input_ids.roll(-1, dims=1)[:, -batch.kept :][mask]
