"""The shots of one recalibration: drawn, tokenised and split, from what the user names or what comes with the vector."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from .calibration import (
    CalibrationSet,
    Row,
    Sample,
    Split,
    check_context,
    conversation,
    draw,
    load_rows,
    shortened,
    split_samples,
    tokenize,
    tokenized_sample,
)
from .config import SafeGeneConfig
from .errors import CalibrationDataError
from .evaluation.prompts import Kind, Prompt, kept_apart, load_prompts
from .gate import GateConfig
from .provenance import sha256_of_json
from .vector import SafetyVector


T = TypeVar("T")


@dataclass(frozen=True)
class Unseen:
    """What no coefficient is fitted on: `harmful` and `benign` prompts for answers, task samples for token accuracy."""

    prompts: dict[str, list[Prompt]]
    task: list[Sample]

    @property
    def counts(self) -> dict[str, int]:
        return {**{kind: len(prompts) for kind, prompts in self.prompts.items()}, "task": len(self.task)}


@dataclass(frozen=True)
class Shots:
    """Samples for the losses, further ones to measure on, and a record for the report."""

    data: CalibrationSet
    unseen: Unseen
    record: dict[str, Any]


def gather_shots(
    config: SafeGeneConfig,
    vector: SafetyVector,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    task_rows: Sequence[Row] | IterableDataset | None,
) -> Shots:
    """Draws harmful, benign and task shots.

    Args:
        config: How many, and from where.
        vector: Brings harmful prompts with refusals and benign prompts with answers.
        tokenizer: The model's.
        context: The model's context length in tokens, None if it has no limit.
        task_rows: The training set, used where `config.task_data` names no other.

    Raises:
        CalibrationDataError: Data is missing, empty, of unknown columns or too long for the model.
    """
    extra = config.num_test_prompts
    harmful_rows, harmful_source = _harmful_rows(config, vector, config.num_safety_shots + extra)
    shipped: list[Row] = [row for row in vector.prompts if row["kind"] == "benign"]
    benign_rows: list[Row] = draw(shipped, config.num_benign_shots + extra, config.seed)
    harmful = _tokenized(harmful_rows, tokenizer, context, "safety data")
    benign = _tokenized(benign_rows, tokenizer, context, "benign prompts")
    harmful_split, harmful_left = _divided(
        harmful_rows, _cut(harmful, context, config.max_refusal_tokens), config.num_safety_shots, config, "safety data"
    )
    benign_split, benign_left = None, benign_rows
    if min(len(benign), config.num_benign_shots) > 1:
        cut = _cut(benign, config.max_length, config.max_refusal_tokens)
        benign_split, benign_left = _divided(benign_rows, cut, config.num_benign_shots, config, "benign prompts")
    task, task_source = _task_samples(config, tokenizer, task_rows, config.num_task_shots + extra)
    check_context([sample for sample in task if sample], context, "task data")
    task_split, task_left = _divided(task, task, config.num_task_shots, config, "task data")
    gate, made_with = config.gate or GateConfig(), list(vector.prompts)
    data = CalibrationSet(harmful_split, task_split, benign_split)
    unseen = Unseen(
        prompts={
            "harmful": _unseen_prompts(
                gate.harmful_data,
                gate.harmful_data_split,
                "harmful",
                [*harmful_rows, *made_with],
                harmful_left,
                config,
            ),
            "benign": _unseen_prompts(
                gate.benign_data, gate.benign_data_split, "benign", made_with, benign_left, config
            ),
        },
        task=[sample for sample in task_left if sample][:extra],
    )
    return Shots(
        data=data,
        unseen=unseen,
        record={
            "safety": _record(harmful_source, harmful_split),
            "task": _record(task_source, task_split),
            "benign": _record("vector", benign_split) if benign_split else None,
            "unseen": {
                kind: {"source": source, "count": unseen.counts[kind]}
                for kind, source in (
                    ("harmful", gate.harmful_data or harmful_source),
                    ("benign", gate.benign_data or "vector"),
                    ("task", task_source),
                )
            },
        },
    )


def _divided(
    items: Sequence[T], samples: Sequence[Sample | None], count: int, config: SafeGeneConfig, what: str
) -> tuple[Split, list[T]]:
    """The first `count` usable samples as shots, and the items that nothing will be fitted on."""
    usable = [(item, sample) for item, sample in zip(items, samples, strict=True) if sample]
    split = split_samples([sample for _, sample in usable[:count]], config.holdout_share, what)
    return split, [item for item, _ in usable[len(split.fit) :]]


def _unseen_prompts(
    source: str | None, data_split: str, kind: Kind, used: Sequence[Row], left: Sequence[Row], config: SafeGeneConfig
) -> list[Prompt]:
    """Prompts of the data that the gate names, those near a used one left out; else what the shots' own data has left."""
    limit = config.num_test_prompts
    if source is None or not limit:
        return [_prompt(row, kind) for row in left[:limit]]
    prompts = load_prompts(source, kind, data_split, 2 * limit, config.seed)
    return kept_apart(prompts, [conversation(row)[0][-1]["content"] for row in used])[0][:limit]


def _prompt(row: Row, kind: Kind) -> Prompt:
    category = row.get("category")
    return Prompt("calibration", kind, None if category is None else str(category), tuple(conversation(row)[0]))


def _harmful_rows(config: SafeGeneConfig, vector: SafetyVector, count: int) -> tuple[list[Row], str]:
    """Harmful prompts with refusals: the user's own, or the vector's. A prompt without refusal gets one of the vector's."""
    shipped: list[Row] = [row for row in vector.prompts if row["kind"] == "harmful"]
    if config.safety_data is None:
        if not shipped:
            raise CalibrationDataError("The safety vector comes without harmful prompts: set `safety_data`.")
        return draw(shipped, count, config.seed), "vector"
    data = load_rows(config.safety_data, config.safety_data_split)
    rows: list[Row] = []
    for position, row in enumerate(draw(data, count, config.seed)):
        messages, response = conversation(row)
        if not response and not shipped:
            raise CalibrationDataError(f"{config.safety_data} has prompts without refusals: add a column `response`.")
        refusal = response or shipped[position % len(shipped)]["response"]
        rows.append({"prompt": messages, "response": refusal, "category": row.get("category")})
    return rows, config.safety_data


def _task_samples(
    config: SafeGeneConfig,
    tokenizer: PreTrainedTokenizerBase,
    task_rows: Sequence[Row] | IterableDataset | None,
    count: int,
) -> tuple[list[Sample | None], str]:
    if config.task_data is not None:
        rows: Iterable[Row] = draw(load_rows(config.task_data, config.task_data_split), count, config.seed)
        source = config.task_data
    elif task_rows is not None:
        rows, source = draw(task_rows, count, config.seed), "training set"
    else:
        raise CalibrationDataError("There is no training set to draw task samples from: set `task_data`.")
    samples = [tokenized_sample(row) or _from_text(row, tokenizer) for row in rows]
    return _cut(samples, config.max_length, config.max_response_tokens), source


def _from_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Sample:
    if isinstance(row.get("text"), str):
        ids = tokenizer(row["text"])["input_ids"]
        return Sample(list(ids), [True] * len(ids))
    messages, response = conversation(row)
    if response is None:
        raise CalibrationDataError(
            f"A task sample has the columns {sorted(row)}: it needs a response to measure utility on."
        )
    return tokenize(tokenizer, messages, response)


def _tokenized(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, context: int | None, what: str
) -> list[Sample]:
    pairs = [conversation(row) for row in rows]
    samples = [tokenize(tokenizer, messages, response or "") for messages, response in pairs]
    check_context(samples, context, what)
    return samples


def _cut(samples: Iterable[Sample], max_length: int | None, max_response_tokens: int) -> list[Sample | None]:
    return [shortened(sample, max_length, max_response_tokens) for sample in samples]


def _record(source: str, split: Split) -> dict[str, Any]:
    return {
        "source": source,
        "sha256": sha256_of_json([sample.input_ids for sample in (*split.fit, *split.held_out)]),
        "fit": len(split.fit),
        "held_out": len(split.held_out),
    }
