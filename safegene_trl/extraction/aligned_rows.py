"""What the aligned model is asked for a vector: its own answers, what it says to their first tokens,
and what it does with prompts to measure on.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config.measure import MeasureConfig
from ..distributed.layouts import Sharding
from ..models.inputs import Sample, padding_id, shortened, tokenize
from ..models.reasoning import PromptStyle
from ..vectors.prompt_rows import Part, rows_of
from .answers import Asked, own_answers, own_verdicts
from .config import ExtractionConfig
from .prompts import ExtractionPrompts
from .soft_targets import soft_targets


logger = logging.getLogger(__name__)
REFUSAL_TOKENS = 8  # whether a model refuses is settled there (arXiv 2406.05946)


@dataclass(frozen=True)
class Inputs:
    """What the two models are asked with, and by which processes; `style` is that of prompts whose
    answer is known.
    """

    config: ExtractionConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: ExtractionPrompts
    job: Sharding
    style: PromptStyle


def answered(
    inputs: Inputs, model: nn.Module, sharding: Sharding, may_refuse_none: bool = False
) -> list[dict[str, Any]]:
    """The aligned model's own answers to the prompts that it is given, as `own_answers` has them.
    Collective.
    """
    config, asked = inputs.config, inputs.prompts.to_answer()
    answering = config.answering(inputs.tokenizer)
    ignored = answering.ignores(config.max_reasoning_tokens, "max_reasoning_tokens")
    if ignored and sharding.is_main:
        logger.warning(ignored)
    with_reasoning = config.safety_target == "reasoning"
    how = Asked(answering, config.max_new_tokens, with_reasoning, may_refuse_none)
    return own_answers(model, inputs.tokenizer, *asked, how, config.batch_size, sharding)


def prompts_to_measure_on(
    inputs: Inputs, model: nn.Module, sharding: Sharding
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Prompts to measure on, each with what the aligned model does, and the vector's record of
    them; nothing without such data.
    """
    prompts, tokenizer, config = inputs.prompts, inputs.tokenizer, inputs.config
    if not prompts.tests:
        return [], {}
    answering = config.measuring(tokenizer)
    asked = Asked(answering, MeasureConfig.max_new_tokens)
    rows, counts = own_verdicts(model, tokenizer, prompts.tests, asked, config.batch_size, sharding)
    for kind in prompts.tests:
        if sharding.is_main and not any(row["kind"] == kind for row in rows):
            logger.warning(
                "The aligned model neither refuses nor answers any of the %s prompts to measure on (its answers: %s): give others.",
                kind,
                ", ".join(f"{count} {label}" for label, count in counts[kind].items()),
            )
    harmful = {row["verdict"] for row in rows if row["kind"] == "harmful"}
    if sharding.is_main and harmful == {"answered"}:
        logger.warning(
            "The aligned model refuses none of the harmful prompts to measure on, so that nobody can be told how many refusals came "
            "back (`gate.min_restored`): give some that it refuses."
        )
    return rows, {"test_prompts": prompts.test_record(answering, counts)}


def with_targets(
    inputs: Inputs, model: Any, rows: Sequence[dict[str, Any]], sharding: Sharding
) -> list[dict[str, Any]]:
    """Rows with what the aligned model itself says to the first tokens of its answers; those that
    have it stay as they are. Collective.
    """
    cut = [
        None if "targets" in row else shortened(_sample(inputs, row), None, REFUSAL_TOKENS)
        for row in rows
    ]
    samples = [sample for sample in cut if sample]
    if not samples:
        return list(rows)
    pad_id, size = padding_id(inputs.tokenizer), inputs.config.batch_size
    found = iter(soft_targets(model, samples, pad_id, sharding, size))
    targets = [next(found) if sample else None for sample in cut]
    return [
        row | {"targets": asdict(own)} if own and own.tokens else row
        for row, own in zip(rows, targets, strict=True)
    ]


def samples_of(inputs: Inputs, rows: Sequence[Mapping[str, Any]], part: Part) -> list[Sample]:
    """The rows of one part as samples, whole."""
    return [_sample(inputs, row) for row in rows_of(rows, part)]


def _sample(inputs: Inputs, row: Mapping[str, Any]) -> Sample:
    messages = [{"role": "user", "content": row["prompt"]}]
    return tokenize(inputs.tokenizer, messages, row["response"], inputs.style)
