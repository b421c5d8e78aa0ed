"""The few samples that recalibration reads: tokenised, bounded in length, split into fitting and held-out."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from ..data.rows import Row as Row  # read from here by many
from ..data.rows import conversation as conversation
from ..errors import CalibrationDataError


T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One tokenised sample: `input_ids` and, for every token, whether it belongs to the response."""

    input_ids: list[int]
    is_response: list[bool]


@dataclass(frozen=True)
class Split:
    """Samples to fit the coefficients on and samples to judge them on."""

    fit: list[Sample]
    held_out: list[Sample]


@dataclass(frozen=True)
class CalibrationSet:
    """What recalibration reads. `benign` may be None; the other two never are."""

    harmful: Split
    task: Split
    benign: Split | None = None


@dataclass(frozen=True)
class Batch:
    """Left-padded tokens, so that responses end together; all tensors B×T.

    Attributes:
        input_ids: int64.
        attention_mask: int64, 0 on padding.
        position_ids: int64, counted without padding.
        target_mask: bool, True where the *next* token belongs to a response.
        kept: Number of trailing positions that hold every target.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    target_mask: torch.Tensor
    kept: int


def load_rows(source: str, split: str) -> Dataset:
    """Reads a local file or directory, or a hub data set; raises `CalibrationDataError` in plain words.

    Args:
        source: Path or hub id. `ID:CONFIG@SPLIT` names one configuration and one split, each of which may be left out.
        split: Split to read where `source` names none.
    """
    path = Path(source)
    name, config, split = (source, None, split) if path.exists() else _parts(source, split)
    try:
        if path.is_file():
            kind = {".jsonl": "json", ".tsv": "csv"}.get(path.suffix, path.suffix.lstrip("."))
            data = load_dataset(kind, data_files=str(path), split="train")
        elif path.is_dir() and (path / "state.json").exists():
            data = load_from_disk(source)
        else:
            data = load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises dozens of kinds; each means the same to the user
        raise CalibrationDataError(
            f"The data set {source} (split {split}) cannot be read or is empty: check the path or hub id, the configuration (`ID:CONFIG@SPLIT` "
            f"names one), the split and the file format "
            f"({type(error).__name__}: {error})."
        ) from error
    if len(data) == 0:
        raise CalibrationDataError(f"The data set {source} (split {split}) is empty: give at least 2 samples.")
    return data


def _parts(source: str, split: str) -> tuple[str, str | None, str]:
    """Name, configuration (None where it is not named) and split (`split` where it is not) of `NAME:CONFIG@SPLIT`."""
    named, _, own_split = source.partition("@")
    name, _, config = named.partition(":")
    return name, config or None, own_split or split


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The prompt as the model reads it, up to where the assistant speaks."""
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return "\n".join(message["content"] for message in messages) + "\n"


def tokenize(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], response: str) -> Sample:
    """Tokenises a prompt with its response, the end-of-turn token included."""
    prompt = prompt_text(tokenizer, messages)
    full = prompt + response + (tokenizer.eos_token or "")
    if tokenizer.chat_template:
        turn = [*messages, {"role": "assistant", "content": response}]
        templated = str(tokenizer.apply_chat_template(turn, tokenize=False)).rstrip("\n")
        full = templated if templated.startswith(prompt) else full
    special = not tokenizer.chat_template
    prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    ids = tokenizer(full, add_special_tokens=special)["input_ids"]
    start = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
    return Sample(list(ids), [position >= start for position in range(len(ids))])


def shortened(sample: Sample, max_length: int | None, max_response_tokens: int) -> Sample | None:
    """The sample cut to its first `max_length` tokens and first response tokens; None if no response is left."""
    limit = len(sample.input_ids) if max_length is None else min(len(sample.input_ids), max_length)
    responses = [position for position in range(1, limit) if sample.is_response[position]]
    end = responses[:max_response_tokens][-1] + 1 if responses else 0
    cut = Sample(sample.input_ids[:end], [False, *sample.is_response[1:end]])
    return cut if any(cut.is_response) else None


def check_context(samples: Iterable[Sample], context: int | None, what: str) -> None:
    """Raises `CalibrationDataError` if a sample is longer than the model's context, in tokens."""
    longest = max((len(sample.input_ids) for sample in samples), default=0)
    if context is not None and longest > context:
        raise CalibrationDataError(
            f"A sample of the {what} has {longest} tokens and the model's context is {context}: shorten or remove it."
        )


def draw(data: Sequence[T] | IterableDataset, count: int, seed: int) -> list[T]:
    """Up to `count` items in seeded random order; from a stream, its first ones. The global RNG is not used."""
    if isinstance(data, IterableDataset):
        return list(data.take(count))
    indices = random.Random(seed).sample(range(len(data)), min(count, len(data)))
    return [data[index] for index in indices]


def split_samples(samples: list[Sample], holdout_share: float, what: str, skipped: object = "") -> Split:
    """Splits samples in the order given; at least one on each side. `skipped` tells in the error what was left out."""
    if len(samples) < 2:
        raise CalibrationDataError(f"The {what} has {len(samples)} usable samples{skipped}: give at least 2.")
    held_out = min(max(round(len(samples) * holdout_share), 1), len(samples) - 1)
    return Split(samples[:-held_out], samples[-held_out:])


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id to pad with; what it is does not matter, as padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def batches(samples: Sequence[Sample], batch_size: int, pad_id: int, device: torch.device) -> list[Batch]:
    """Groups samples of like length into as few batches as can be, of like size, and pads them on the left."""
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    count = math.ceil(len(ordered) / batch_size)
    groups = [ordered[len(ordered) * i // count : len(ordered) * (i + 1) // count] for i in range(count)]
    return [_collate(group, pad_id, device) for group in groups]


def _collate(samples: list[Sample], pad_id: int, device: torch.device) -> Batch:
    width = max(len(sample.input_ids) for sample in samples)
    ids = torch.full((len(samples), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    targets = torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, width - length :] = torch.tensor(sample.input_ids)
        attention[row, width - length :] = 1
        targets[row, width - length : width - 1] = torch.tensor(sample.is_response[1:])
    first = int(targets.any(dim=0).nonzero()[0])
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(ids.to(device), attention.to(device), positions.to(device), targets.to(device), kept=width - first)
