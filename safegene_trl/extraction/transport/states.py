"""What a model has in mind of texts: pooled hidden states, streamed to a disk.

Two models with different tokenizers have no tokens in common, so states are pooled by text: `last`
is the state at the last token of the prompt, where the answer begins, `mean` that over the tokens of
what the user says. The tokens of the template, the same for all texts, are left out of the mean, and
so is the first token of all, on which many models put states of a thousand times the usual size
(arXiv 2402.17762).
"""

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ...distributed.layouts import Sharding
from ...errors import FamilyError, OutputError
from ...models.batch_size import EXTRACTION, fitting_answers, halving
from ...models.generation import prompt_tokens
from ...models.inputs import padding_id
from ...models.parameters import base_model
from ...models.reasoning import PromptStyle
from ...models.residual import watched


POOLINGS = ("last", "mean")
BLOCK = 256  # rows that are read at once


@dataclass(frozen=True)
class Rows:
    """A matrix on disk, texts×width, float32; only the rows that are asked for are read.

    Attributes:
        path: The file.
        count: How many texts.
        width: Numbers of a state.
    """

    path: Path
    count: int
    width: int

    def open(self, mode: Literal["r", "r+", "w+"] = "r") -> np.memmap:
        """The matrix; its pages are read when they are used."""
        return np.memmap(self.path, np.float32, mode, shape=(self.count, self.width))

    def read(self, rows: Sequence[int] | np.ndarray | slice = slice(None)) -> np.ndarray:
        """Some rows, float64, in memory."""
        return np.asarray(self.open()[rows], dtype=np.float64)


@dataclass(frozen=True)
class Reader:
    """A model and how texts are put to it.

    Attributes:
        name: For messages.
        model: Live.
        tokenizer: Its own.
        sharding: How it is spread over ranks.
        style: Of the prompts.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    sharding: Sharding
    style: PromptStyle

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Of every text as a prompt."""
        turns = [[{"role": "user", "content": text}] for text in texts]
        return prompt_tokens(self.tokenizer, turns, self.style)

    def around(self) -> tuple[int, int]:
        """How many tokens a prompt has before and after what the user says, at least."""
        one, other = self.tokens(["zq", "7 up"])
        before = _alike(one, other)
        return max(before, 1), min(_alike(one[::-1], other[::-1]), len(one) - before - 1)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


@torch.no_grad()
def record(
    reader: Reader,
    texts: Sequence[str],
    folder: Path,
    outputs: Mapping[str, nn.Module],
    inputs: Mapping[str, nn.Module],
    pooling: str,
    inputs_of: int,
) -> dict[tuple[str, str], Rows]:
    """Pooled states of texts at modules of a model, in files. Collective; rank 0 has them.

    Args:
        reader: The model.
        texts: Each one user turn; one or more.
        folder: Of their own.
        outputs: By name, modules whose outputs count.
        inputs: By name, modules whose inputs count.
        pooling: Of the outputs; inputs are pooled in all of `POOLINGS`.
        inputs_of: How many texts have their inputs recorded, the first ones.

    Returns:
        By name and pooling the states, in the order of the texts.

    Raises:
        FamilyError: A state is NaN or infinite.
        MemoryShortageError: Memory runs out with one text at a time.
        OutputError: They cannot be written.
    """
    sharding = reader.sharding
    tokens, around = reader.tokens(texts), reader.around()
    counts = dict.fromkeys(outputs, len(texts)) | dict.fromkeys(inputs, min(inputs_of, len(texts)))
    poolings = dict.fromkeys(outputs, (pooling,)) | dict.fromkeys(inputs, POOLINGS)
    files = _Files(reader, folder, counts, poolings)
    longest = max(map(len, tokens))
    first = fitting_answers(None, base_model(reader.model), longest, 1, sharding)
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    reader.model.eval()

    def passes(batch_size: int) -> None:
        with sharding.forward_passes():
            begun = _begun(reader, tokens, around[0])
            for start in range(0, len(order), batch_size):
                group = order[start : start + batch_size]
                rest = [tokens[index][begun.length :] for index in group]
                files.begin(group, list(map(len, rest)), (around[0] - begun.length, around[1]))
                with watched(outputs, inputs, files.add):
                    _pass(reader, begun, rest)
                sharding.reshard()

    halving(first, passes, sharding, EXTRACTION)
    with sharding.raising_together():
        files.check()
    return files.rows


@dataclass(frozen=True)
class _Begun:
    """What the template puts before every text, and what the model keeps of it: half of a sentence's
    tokens, which are read once.
    """

    length: int = 0
    cache: DynamicCache | None = None


def _begun(reader: Reader, tokens: Sequence[Sequence[int]], length: int) -> _Begun:
    """Nothing where texts begin otherwise, or the model keeps something else than keys and values of
    all tokens.
    """
    first = list(tokens[0][:length])
    if any(len(ids) <= length or list(ids[:length]) != first for ids in tokens):
        return _Begun()
    body = base_model(reader.model).base_model
    kept = body(input_ids=torch.tensor([first]).to(reader.sharding.device), use_cache=True)
    reader.sharding.reshard()
    cache = getattr(kept, _cache_name(body), None)
    plain = type(cache) is DynamicCache and all(type(own) is DynamicLayer for own in cache.layers)
    return _Begun(length, cache) if plain else _Begun()


def _cache_name(body: nn.Module) -> str:
    """What this version of transformers calls the keys and values of earlier tokens."""
    names = inspect.signature(body.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _pass(reader: Reader, begun: _Begun, group: Sequence[Sequence[int]]) -> None:
    """Puts prompts, without what they all begin with, through the layers, and not through the head;
    they are padded on the right, where none of their tokens looks.
    """
    rows = [torch.tensor(ids) for ids in group]
    ids = pad_sequence(rows, batch_first=True, padding_value=padding_id(reader.tokenizer))
    whole = [torch.ones(begun.length + len(row), dtype=torch.long) for row in rows]
    attention = pad_sequence(whole, batch_first=True)
    cache = copy.deepcopy(begun.cache)
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    device = reader.sharding.device
    body = base_model(reader.model).base_model
    earlier = {} if cache is None else {_cache_name(body): cache}
    body(
        input_ids=ids.to(device),
        attention_mask=attention.to(device),
        use_cache=bool(earlier),
        **earlier,
    )


class _Files:
    """The files that pooled states are written to, row by row, and what of them is not finite.

    Args:
        reader: Whose states they are.
        folder: Where they lie.
        counts: By name, of how many texts there are states.
        poolings: By name, how they are pooled.

    Attributes:
        rows: What there is, by name and pooling.
    """

    def __init__(
        self,
        reader: Reader,
        folder: Path,
        counts: Mapping[str, int],
        poolings: Mapping[str, Sequence[str]],
    ):
        self._reader, self._folder = reader, folder
        self._counts, self._poolings = counts, poolings
        self._group = np.zeros(0, int)
        self._weights: dict[str, torch.Tensor] = {}
        self._open: dict[tuple[str, str], np.memmap] = {}
        self._broken: str | None = None
        self.rows: dict[tuple[str, str], Rows] = {}

    def begin(self, group: Sequence[int], lengths: list[int], around: tuple[int, int]) -> None:
        """Says which texts come next."""
        self._group = np.array(group)
        self._weights = {name: torch.zeros(len(group), max(lengths)) for name in POOLINGS}
        for row, length in enumerate(lengths):
            start = min(around[0], length - 1)
            end = max(length - around[1], start + 1)
            self._weights["mean"][row, start:end] = 1 / (end - start)
            self._weights["last"][row, length - 1] = 1

    def add(self, name: str, states: torch.Tensor) -> None:
        """Takes what a module returns, or is given."""
        here = self._group < self._counts[name]
        for pooling in self._poolings[name]:
            weights = self._weights[pooling].to(states.device)
            # a sum of products would make NaN of what is masked and infinite
            used = states.float().masked_fill((weights == 0)[..., None], 0)
            pooled = (weights[:, None] @ used)[:, 0].cpu().numpy()
            if not np.isfinite(pooled).all():
                self._broken = self._broken or name
            if self._reader.sharding.is_main:
                file = self._file((name, pooling), pooled.shape[1])
                file[self._group[here]] = pooled[here]

    def _file(self, key: tuple[str, str], width: int) -> np.memmap:
        if key not in self._open:
            rows = Rows(self._folder / f"{key[1]}-{key[0]}", self._counts[key[0]], width)
            _reserve(rows.path, rows.count * width * np.dtype(np.float32).itemsize)
            self.rows[key], self._open[key] = rows, rows.open("r+")
        return self._open[key]

    def check(self) -> None:
        """Raises `FamilyError` for a state that is not finite."""
        if self._broken is not None:
            raise FamilyError(
                f"The hidden states of {self._reader.name} are NaN or infinite at `{self._broken}`: it has diverged, or its numbers "
                "are too large for the `dtype` it is loaded in: set `dtype: float32`."
            )


def _reserve(path: Path, size: int) -> None:
    """A file of that size. Without its blocks a full disk would end the process when they are
    written.

    Raises:
        OutputError: There is no room.
    """
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise OutputError(
            f"The hidden states cannot be written to {path.parent} ({error.strerror or error}): free space, or set `TMPDIR` to "
            "a folder on a larger disk."
        ) from error
