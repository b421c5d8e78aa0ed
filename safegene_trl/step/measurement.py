"""What a model answers before and after it takes the vector on: refusals, coherence, task accuracy,
on items no coefficient was fitted on.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config.metrics import shares
from ..config.settings import SafeGeneConfig
from ..data.shots import Unseen
from ..distributed.layouts import Sharding
from ..judges import Exchange, judged
from ..judges.intervals import mean_interval, rate
from ..judges.refusal_phrases import RefusalPhrases
from ..models.attachment import frozen_for_calibration
from ..models.generation import generate_answers
from ..models.inputs import Batch, batches, padding_id
from ..models.losses import response_logits


def measure(
    model: nn.Module,
    with_vector: Callable[[], AbstractContextManager[None]],
    unseen: Unseen,
    tokenizer: PreTrainedTokenizerBase,
    config: SafeGeneConfig,
    sharding: Sharding,
    batch_size: int,
) -> dict[str, Any]:
    """Collective: measures the model as it is and with the vector on; it is left as it was.

    Returns:
        `before` and `after`: `refusal_rate` (of harmful prompts), `over_refusal` (of benign ones),
            `incoherent` (of both), whatever else the table of metrics counts, and, per
        category of harmful prompts, `categories`; each a share with Wilson's 95 % interval.
            `utility_loss`: mean loss of token accuracy
        over the task samples with a bootstrap interval. What there is nothing to measure on is left
            out.
    """
    batched = (
        batches(unseen.task, batch_size, padding_id(tokenizer), sharding.device)
        if unseen.task
        else []
    )

    def one_side() -> tuple[dict[str, Any], torch.Tensor]:
        return _answers(model, unseen, tokenizer, config, sharding, batch_size), _token_accuracy(
            model, batched, sharding
        )

    with frozen_for_calibration(model):
        before, right_before = one_side()
        with with_vector():
            after, right_after = one_side()
    found: dict[str, Any] = {
        "judge": "refusal_phrases",
        "decoding": "greedy",
        "max_new_tokens": config.measure.max_new_tokens,
        "before": before,
        "after": after,
    }
    if batched:
        found["token_accuracy"] = {
            "before": float(right_before.mean()),
            "after": float(right_after.mean()),
        }
        losses = (right_before - right_after).tolist()
        low, high = mean_interval(losses)
        found["utility_loss"] = {
            "share": float(sum(losses) / len(losses)),
            "low": low,
            "high": high,
            "count": len(losses),
        }
    return found


def _answers(
    model: nn.Module,
    unseen: Unseen,
    tokenizer: PreTrainedTokenizerBase,
    config: SafeGeneConfig,
    sharding: Sharding,
    batch_size: int,
) -> dict[str, Any]:
    labels: dict[str, list[str]] = {}
    for kind, prompts in unseen.prompts.items():
        messages = [list(prompt.messages) for prompt in prompts]
        own = generate_answers(
            model, tokenizer, messages, config.measure.max_new_tokens, batch_size, sharding
        )
        exchanges = [
            Exchange(p.text, answer)
            for p, answer in zip(prompts, sharding.gather_texts(own), strict=True)
        ]
        labels[kind] = [verdict.label for verdict in judged(RefusalPhrases(), exchanges)]
    found: dict[str, Any] = {}
    for metric in shares():
        if own := [label for kind in metric.kinds for label in labels[kind]]:
            found[metric.key] = _share(own, metric.label)
    categories: dict[str, list[str]] = defaultdict(list)
    for prompt, label in zip(unseen.prompts["harmful"], labels["harmful"], strict=True):
        if prompt.category is not None:
            categories[prompt.category].append(label)
    if categories:
        found["categories"] = {
            name: _share(own, "refused") for name, own in sorted(categories.items())
        }
    return found


def _share(labels: Sequence[str], wanted: str) -> dict[str, float | int]:
    found = rate([label == wanted for label in labels])
    assert found is not None
    return found.to_dict()


@torch.no_grad()
def _token_accuracy(model: nn.Module, batched: Sequence[Batch], sharding: Sharding) -> torch.Tensor:
    """Collective: of every sample the share of response tokens that the model finds most likely;
    float64.
    """
    rows = torch.zeros(
        len(batched), max((len(b.input_ids) for b in batched), default=0), dtype=torch.float64
    )
    with sharding.forward_passes():
        for index in sharding.share(len(batched)):
            batch = batched[index or 0]
            logits, targets = response_logits(model, batch)
            counts = batch.target_mask.sum(dim=1).tolist()
            right = (logits.argmax(dim=-1) == targets).double().split(counts)
            sharding.reshard()
            if index is not None:
                rows[index, : len(right)] = torch.stack([part.mean() for part in right]).cpu()
    rows = sharding.sum(rows)
    return (
        torch.cat([row[: len(batch.input_ids)] for row, batch in zip(rows, batched, strict=True)])
        if batched
        else rows
    )
