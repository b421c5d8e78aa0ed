"""The shots of one recalibration: drawn, tokenised and split, from what the user names or what comes with the vector."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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
from .provenance import sha256_of_json
from .vector import SafetyVector


@dataclass(frozen=True)
class Shots:
    """Samples for the losses, prompts (as messages) for generated answers, and a record for the report."""

    data: CalibrationSet
    prompts: dict[str, list[list[dict[str, str]]]]
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
    harmful_rows, harmful_source = _harmful_rows(config, vector)
    shipped: list[Row] = [row for row in vector.prompts if row["kind"] == "benign"]
    benign_rows: list[Row] = draw(shipped, config.num_benign_shots, config.seed)
    harmful = _tokenized(harmful_rows, tokenizer, context, "safety data")
    harmful = _cut(harmful, context, config.max_refusal_tokens)
    benign = _tokenized(benign_rows, tokenizer, context, "benign prompts")
    benign = _cut(benign, config.max_length, config.max_refusal_tokens)
    task, task_source = _task_samples(config, tokenizer, task_rows)
    check_context(task, context, "task data")
    data = CalibrationSet(
        harmful=split_samples(harmful, config.holdout_share, "safety data"),
        task=split_samples(task, config.holdout_share, "task data"),
        benign=split_samples(benign, config.holdout_share, "benign prompts") if len(benign) > 1 else None,
    )
    return Shots(
        data=data,
        prompts={
            "harmful": [conversation(row)[0] for row in harmful_rows],
            "benign": [conversation(row)[0] for row in benign_rows],
        },
        record={
            "safety": _record(harmful_source, harmful, data.harmful),
            "task": _record(task_source, task, data.task),
            "benign": _record("vector", benign, data.benign) if data.benign else None,
        },
    )


def _harmful_rows(config: SafeGeneConfig, vector: SafetyVector) -> tuple[list[Row], str]:
    """Harmful prompts with refusals: the user's own, or the vector's. A prompt without refusal gets one of the vector's."""
    shipped: list[Row] = [row for row in vector.prompts if row["kind"] == "harmful"]
    if config.safety_data is None:
        if not shipped:
            raise CalibrationDataError("The safety vector comes without harmful prompts: set `safety_data`.")
        return draw(shipped, config.num_safety_shots, config.seed), "vector"
    data = load_rows(config.safety_data, config.safety_data_split)
    rows: list[Row] = []
    for position, row in enumerate(draw(data, config.num_safety_shots, config.seed)):
        messages, response = conversation(row)
        if not response and not shipped:
            raise CalibrationDataError(f"{config.safety_data} has prompts without refusals: add a column `response`.")
        rows.append({"prompt": messages, "response": response or shipped[position % len(shipped)]["response"]})
    return rows, config.safety_data


def _task_samples(
    config: SafeGeneConfig, tokenizer: PreTrainedTokenizerBase, task_rows: Sequence[Row] | IterableDataset | None
) -> tuple[list[Sample], str]:
    if config.task_data is not None:
        rows: Iterable[Row] = draw(
            load_rows(config.task_data, config.task_data_split), config.num_task_shots, config.seed
        )
        source = config.task_data
    elif task_rows is not None:
        rows, source = draw(task_rows, config.num_task_shots, config.seed), "training set"
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


def _cut(samples: Iterable[Sample], max_length: int | None, max_response_tokens: int) -> list[Sample]:
    cut = (shortened(sample, max_length, max_response_tokens) for sample in samples)
    return [sample for sample in cut if sample]


def _record(source: str, samples: Sequence[Sample], split: Split) -> dict[str, Any]:
    return {
        "source": source,
        "sha256": sha256_of_json([sample.input_ids for sample in samples]),
        "fit": len(split.fit),
        "held_out": len(split.held_out),
    }
