"""What a model's answers to samples are worth: losses of the response tokens, in nats."""

import inspect

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import nn

from .inputs import Batch
from .parameters import base_model


LIKELY_TOKENS = (
    16  # softened over the whole vocabulary, what never is an answer would outweigh what is
)


def cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Every sample's summed cross-entropy of its response tokens, in nats, float32 of shape
    (batch,).
    """
    logits, next_ids = response_logits(model, batch)
    return _by_sample(F.cross_entropy(logits, next_ids, reduction="none"), batch)


def divergence(
    model: nn.Module, batch: Batch, reference: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Every sample's summed `KL(reference ‖ model)` over its response tokens, in nats, float32 of
    shape (batch,).

    Above 1 a `temperature` T adds `T²·KL` of both at T, over the reference's likeliest tokens
    (arXiv 1503.02531).

    `reference`: log-probabilities, tokens×vocabulary.
    """
    log_probs = F.log_softmax(response_logits(model, batch)[0], dim=-1)
    reference = reference.to(log_probs.device)
    terms = _kl(reference, log_probs)
    if temperature > 1:
        likely = reference.topk(min(LIKELY_TOKENS, reference.shape[-1])).indices
        terms = terms + temperature**2 * _kl(
            *(_softened(p, likely, temperature) for p in (reference, log_probs))
        )
    return _by_sample(terms, batch)


def _kl(reference: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_probs, reference, reduction="none", log_target=True).sum(dim=-1)


def _softened(log_probs: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.log_softmax(log_probs.gather(-1, tokens) / temperature, dim=-1)


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
    mask = batch.target_mask[:, -batch.kept :]
    next_ids = batch.input_ids.roll(-1, dims=1)[:, -batch.kept :]
    return output.logits[:, -batch.kept :][mask].float(), next_ids[mask]
