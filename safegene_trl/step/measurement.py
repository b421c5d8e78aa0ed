"""What a model answers before and after it takes the vector on: refusals, coherence, task accuracy,
on items no coefficient was fitted on.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config.metrics import shares
from ..config.settings import SafeGeneConfig
from ..data.prompts import Prompt
from ..data.unseen import Unseen
from ..distributed.layouts import Sharding
from ..judges import Exchange, judged
from ..judges.intervals import mean_interval, rate
from ..judges.languages import LANGUAGES
from ..judges.refusal_phrases import RefusalPhrases
from ..models.attachment import frozen_for_calibration
from ..models.batch_size import fitting_answers
from ..models.generation import answers_to_tokens, prompt_tokens
from ..models.inputs import Batch, batches, padding_id
from ..models.losses import likeliest_tokens
from ..models.parameters import base_model
from .against_aligned import against_aligned
from .examples import Answered, examples


class Measurement:
    """What a model is measured on, tokenised once for before and after and however often it starts
    again.

    Args:
        unseen: Prompts and task samples.
        tokenizer: The model's.
        config: How many tokens an answer may have, and how many samples a batch.
        sharding: How the model is spread over ranks.
    """

    def __init__(
        self,
        unseen: Unseen,
        tokenizer: PreTrainedTokenizerBase,
        config: SafeGeneConfig,
        sharding: Sharding,
    ):
        self._unseen, self._tokenizer, self._sharding = unseen, tokenizer, sharding
        self._config = config
        self._prompts = [prompt for kind in unseen.prompts.values() for prompt in kind]
        messages = [list(prompt.messages) for prompt in self._prompts]
        self._answering = unseen.answering
        self._new_tokens = config.measure.max_new_tokens + self._answering.max_reasoning_tokens
        self._tokens = prompt_tokens(tokenizer, messages, self._answering.style)
        self._before: tuple[dict[str, list[Answered]], torch.Tensor] | None = None

    def at_once(self, model: nn.Module) -> int:
        """Collective: prompts, or task samples, that are measured in one forward pass."""
        task = self._unseen.task
        prompts = [len(ids) + self._new_tokens for ids in self._tokens]
        samples = [len(sample.input_ids) for sample in task]
        responses = max((sum(sample.is_response) for sample in task), default=1)
        longest, wanted = max(prompts + samples), self._config.batch_size
        return fitting_answers(wanted, base_model(model), longest, responses, self._sharding)

    def measure(
        self,
        model: nn.Module,
        with_vector: Callable[[], AbstractContextManager[None]],
        batch_size: int,
    ) -> dict[str, Any]:
        """Collective: measures the model as it is and with the vector on; it is left as it was.

        The side with the vector comes first: where it is on already, it need not be put on again.
        The model as it is is measured once, however often it is called.

        Returns:
            `before` and `after`: `refusal_rate` (of harmful prompts), `over_refusal` (of benign
            ones), `incoherent` (of both), whatever else the table of metrics counts, and, per
            category of harmful prompts, `categories`; each a share with Wilson's 95 % interval. Of
            a reasoning model `unfinished`, too: the share of answers whose reasoning did not end,
            which count as incoherent.
            `utility_loss`: mean loss of token accuracy over the task samples with a bootstrap
            interval, which has a width of its own where samples are alike.
            Where it is known what the aligned model does with all prompts of a kind, what
            `against_aligned` gives, too. Of what the judge cannot know, `unjudged` says how many
            there are where there are any; no share but its own counts them.
            `examples`: a few of the answers, for a person to read.
            What there is nothing to measure on is left out.
        """
        task, pad_id = self._unseen.task, padding_id(self._tokenizer)
        batched = batches(task, batch_size, pad_id, self._sharding.device) if task else []

        def one_side() -> tuple[dict[str, list[Answered]], torch.Tensor]:
            answers = self._answers(model, batch_size)
            return answers, _token_accuracy(model, batched, self._sharding)

        with frozen_for_calibration(model):
            with with_vector():
                said_after, right_after = one_side()
            self._before = self._before or one_side()
        said_before, right_before = self._before
        before, after = _labels(said_before), _labels(said_after)
        found: dict[str, Any] = {
            "judge": "refusal_phrases",
            "languages": list(LANGUAGES),
            "decoding": "greedy",
            "max_new_tokens": self._config.measure.max_new_tokens,
            **self._answering.record,
            "before": self._shares(before),
            "after": self._shares(after),
            **against_aligned(self._unseen.verdicts, before, after),
            **self._examples(said_before, said_after),
        }
        if batched:
            found["token_accuracy"] = {
                "before": float(right_before.mean()),
                "after": float(right_after.mean()),
            }
            losses = (right_before - right_after).tolist()
            # the least by which one sample can differ: one of its tokens
            step = fmean(1 / sum(sample.is_response) for sample in task)
            low, high = mean_interval(losses, step=step)
            found["utility_loss"] = {
                "share": float(sum(losses) / len(losses)),
                "low": low,
                "high": high,
                "count": len(losses),
            }
        return found

    def _answers(self, model: nn.Module, batch_size: int) -> dict[str, list[Answered]]:
        """The answers and what the judge says of them, by kind of prompts; those of all kinds are
        answered in one set of batches.
        """
        own = answers_to_tokens(
            model,
            self._tokenizer,
            self._tokens,
            self._new_tokens,
            batch_size,
            self._sharding,
        )
        replies = [self._answering.read(text) for text in self._sharding.gather_texts(own)]
        exchanges = [
            Exchange(prompt.text, reply.answer, finished=reply.finished)
            for prompt, reply in zip(self._prompts, replies, strict=True)
        ]
        verdicts = judged(RefusalPhrases(), exchanges)
        found = iter(
            Answered(reply.answer, verdict.label)
            for reply, verdict in zip(replies, verdicts, strict=True)
        )
        return {
            kind: [next(found) for _ in prompts] for kind, prompts in self._unseen.prompts.items()
        }

    def _examples(
        self, before: Mapping[str, list[Answered]], after: Mapping[str, list[Answered]]
    ) -> dict[str, Any]:
        """Of prompts that come with the vector alone: others may be nobody else's business."""
        prompts = {
            kind: own
            for kind, own in self._unseen.prompts.items()
            if kind in self._unseen.from_vector
        }
        found = examples(prompts, before, after, self._config.measure.num_examples)
        return {"examples": found} if found else {}

    def _shares(self, labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        found = _shares(self._unseen.prompts["harmful"], labels)
        every = [label for own in labels.values() for label in own]
        if self._answering.written is not None and every:
            found["unfinished"] = _share(every, "unfinished")
        return found


def _labels(answers: Mapping[str, Sequence[Answered]]) -> dict[str, list[str]]:
    return {kind: [one.label for one in own] for kind, own in answers.items()}


# Who never comes to an answer is of no more use than who writes nonsense.
_COUNTED = {"incoherent": ("incoherent", "unfinished")}


def _shares(harmful: Sequence[Prompt], labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the table of metrics counts, and refusals by category.

    Args:
        harmful: The harmful prompts.
        labels: The judge's, by kind of prompts.
    """
    found: dict[str, Any] = {}
    for metric in shares():
        if own := [label for kind in metric.kinds for label in labels[kind]]:
            found[metric.key] = _share(own, *_COUNTED.get(metric.label, (metric.label,)))
    categories: dict[str, list[str]] = defaultdict(list)
    for prompt, label in zip(harmful, labels["harmful"], strict=True):
        if prompt.category is not None:
            categories[prompt.category].append(label)
    if categories:
        found["categories"] = {
            name: _share(own, "refused") for name, own in sorted(categories.items())
        }
    return found


def _share(labels: Sequence[str], *wanted: str) -> dict[str, float | int]:
    found = rate([label in wanted for label in labels])
    assert found is not None
    unjudged = list(labels).count("unjudged") if "unjudged" not in wanted else 0
    return found.to_dict() | ({"unjudged": unjudged} if unjudged else {})


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
            likeliest, targets = likeliest_tokens(model, batch)
            counts = batch.target_mask.sum(dim=1).tolist()
            right = (likeliest == targets).double().split(counts)
            sharding.reshard()
            if index is not None:
                rows[index, : len(right)] = torch.stack([part.mean() for part in right]).cpu()
    rows = sharding.sum(rows)
    return (
        torch.cat([row[: len(batch.input_ids)] for row, batch in zip(rows, batched, strict=True)])
        if batched
        else rows
    )
