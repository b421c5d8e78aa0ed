"""One row of a data set, in any accepted format: as plain values, and as a conversation."""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset

from ..config.validation import is_template_options
from ..errors import CalibrationDataError
from ..text import read_json


Row = Mapping[str, Any]
Message = dict[str, Any]
_RESPONSE_COLUMNS = ("response", "completion", "chosen")
_PROMPT_COLUMNS = "`prompt`, `messages`, or `prompt` with `response`, `completion` or `chosen`"
_IMAGES = ("image", "images", "pixel_values", "video", "videos", "audio", "audios")
_ARGUMENTS, _TEMPLATE = "chat_template_kwargs", "chat_template"  # TRL's names
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_FORMATS_OF_VALUES = (
    None,
    "torch",
    "numpy",
    "python",
    "pandas",
    "polars",
    "jax",
    "tensorflow",
    "arrow",
)


class UnreadableRowError(CalibrationDataError):
    """One row that cannot be read; `reason` says why, in a few words, so that rows can be counted
    by it.
    """

    def __init__(self, reason: str, message: str | None = None):
        super().__init__(message or f"A row cannot be read ({reason}): correct or remove it.")
        self.reason = reason


class Skipped(Counter[str]):
    """How many rows were left out, by reason; `example` is what was said of the last one."""

    example = ""

    def add(self, error: UnreadableRowError) -> None:
        """Counts one row."""
        self[error.reason] += 1
        self.example = str(error)

    def __str__(self) -> str:
        """As part of a sentence: ` (skipped: 3 with no assistant turn; …)`, empty where there are
        none.
        """
        if not self:
            return ""
        reasons = ", ".join(f"{count} with {reason}" for reason, count in self.items())
        return f" (skipped: {reasons}; {self.example.rstrip('.')})"


@dataclass(frozen=True)
class Conversation:
    """A whole conversation and which of it is learnt.

    Attributes:
        messages: All turns; every `content` is text.
        first: Index of the first turn that may be learnt: assistant turns before it belong to the
            prompt.
        template: Arguments for the chat template, such as `tools`.
    """

    messages: list[Message]
    first: int
    template: dict[str, Any] = field(default_factory=dict)

    @property
    def replies(self) -> list[int]:
        """Indices of the assistant turns that are learnt."""
        return [
            i for i, m in enumerate(self.messages) if i >= self.first and m["role"] == "assistant"
        ]


def plain(value: Any) -> Any:
    """The value with tensors, arrays and their scalars as Python lists and numbers, at any depth."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def unformatted(rows: Any) -> Any:
    """The data set below what only spreads or formats its rows; a transform of the user's own
    stays.
    """
    while isinstance(rows, IterableDatasetShard):  # every process would read other rows
        rows = rows.dataset
    if isinstance(rows, Dataset) and rows.format["type"] in _FORMATS_OF_VALUES:
        return rows.with_format(None, columns=rows.column_names)
    return rows


def stream(rows: Any, source: str) -> Iterator[Any]:
    """The rows of a stream from its start; the training reads them once more.

    Raises:
        CalibrationDataError: It is none of `datasets`. Nothing tells of any other, e.g. one that
            reads an open file, whether what is read here would be missing from the training.
    """
    if not isinstance(rows, IterableDataset):
        raise CalibrationDataError(
            f"The {source} is a stream that the training may be able to read only once: set `data.task_data` to a data set of its own, or "
            "make the stream one of `datasets`."
        )
    return iter(rows)


def drawn(rows: Any, count: int, seed: int) -> Iterator[Any]:
    """All rows of a map-style data set in a random order, as they are needed; the first `count` as
    `draw` gives them.
    """
    size, generator = len(rows), random.Random(seed)
    first = generator.sample(range(size), min(count, size))
    yield from (rows[index] for index in first)
    used = set(first)
    moved: dict[int, int] = {}  # a shuffle of all indices that remembers only what it has moved
    for position in range(size):
        other = generator.randrange(position, size)
        index, moved[other] = moved.get(other, other), moved.get(position, position)
        if index not in used:
            yield rows[index]


def check_text(value: Any, what: str) -> str:
    """`value`, which must be text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise UnreadableRowError(f"{what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise UnreadableRowError(f"{what} is not valid Unicode") from error
    return value


def is_unicode(text: Any) -> bool:
    """Whether `value` is text that can be written as UTF-8."""
    try:
        check_text(text, "text")
    except UnreadableRowError:
        return False
    return True


def check_desirable(row: Row) -> None:
    """Raises `UnreadableRowError` for an answer that KTO's `label` marks as one to unlearn."""
    label = row.get("label")
    # a data set of another kind may number its classes from 0 in the same column
    if (label is False and "completion" in row) or (label == 0 and "completion_ids" in row):
        raise UnreadableRowError("an answer that is labelled undesirable")


def holds_no_answer(row: Row) -> bool:
    """Whether the row is a prompt to which the training itself finds answers, as GRPO's are."""
    answers = (*_RESPONSE_COLUMNS, "messages", "conversations", "text", "input_ids")
    return row.get("prompt") is not None and all(row.get(name) is None for name in answers)


def read_messages(value: Any, what: str) -> list[Message]:
    """Chat messages with text as content; text parts are joined.

    Raises:
        UnreadableRowError: A turn has no role or no text, or shows an image.
    """
    if isinstance(value, Mapping):  # a list of structs, kept as a struct of lists
        value = [
            dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)
        ]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UnreadableRowError(f"{what} is empty or no list of messages")
    return [_message(turn, what) for turn in value]


def read_conversation(row: Row) -> Conversation:
    """The conversation of a row.

    The replies that are learnt are those of `completion`, of `response` or `chosen`, or all of
    `messages`.

    Raises:
        UnreadableRowError: The row has none of the columns, or its turns cannot be read.
    """
    row = plain(row)
    for name in _IMAGES:
        if row.get(name) not in (None, [], ""):
            raise UnreadableRowError("images, video or sound")
    prompt = row.get("prompt")
    answer = next((row[name] for name in _RESPONSE_COLUMNS if row.get(name) is not None), None)
    template = template_arguments(row.get(_ARGUMENTS)) | _tools(row)
    # a preference with its prompt inside
    if prompt is None and isinstance(row.get("chosen"), list):
        turns = read_messages(row["chosen"], "chosen")
        return Conversation(turns, len(turns) - 1, template)
    dialogue = row.get("messages") or row.get("conversations")
    if prompt is None and dialogue:
        return Conversation(read_messages(dialogue, "messages"), 0, template)
    if prompt is None or prompt in ("", [], {}):
        raise UnreadableRowError(
            "no prompt",
            f"A calibration sample has the columns {sorted(row)}: it needs {_PROMPT_COLUMNS}.",
        )
    if isinstance(prompt, list | dict):
        messages = read_messages(prompt, "prompt")
    else:
        messages = [{"role": "user", "content": check_text(prompt, "prompt")}]
    if answer is None:
        return Conversation(messages, len(messages), template)
    if isinstance(answer, list | dict):
        replies = read_messages(answer, "completion")
        return Conversation([*messages, *replies], len(messages), template)
    reply = {"role": "assistant", "content": check_text(answer, "response")}
    return Conversation([*messages, reply], len(messages), template)


def conversation(row: Row) -> tuple[list[Message], str | None]:
    """Prompt messages and response text (None if there is none) of a row in any of the accepted
    formats.

    Raises:
        UnreadableRowError: The row has none of the columns, or its turns cannot be read.
    """
    whole = read_conversation(row)
    last = whole.messages[-1]
    if (
        len(whole.messages) > 1
        and whole.first < len(whole.messages)
        and last["role"] == "assistant"
    ):
        return whole.messages[:-1], last["content"]
    return whole.messages, None


def prompt_of(row: Row) -> list[Message]:
    """The messages of a row up to where the assistant speaks, with text in the last one.

    Raises:
        UnreadableRowError: There is no such prompt.
    """
    messages = conversation(row)[0]
    if messages[-1]["role"] == "assistant":
        raise UnreadableRowError("no prompt")
    if not messages[-1]["content"].strip():
        raise UnreadableRowError("empty prompt")
    return messages


def _message(turn: Any, what: str) -> Message:
    if not isinstance(turn, Mapping):
        raise UnreadableRowError(f"{what} is empty or no list of messages")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not role:
        raise UnreadableRowError("message without a role")
    if content is None and not turn.get("tool_calls"):
        raise UnreadableRowError("message without content")
    rest = {
        k: v
        for k, v in turn.items()
        if v is not None and k not in ("role", "from", "content", "value")
    }
    return {"role": _ROLES.get(role, role), "content": _content(content), **rest}


def _content(content: Any) -> str:
    if content is None:
        return ""
    if not isinstance(content, list):
        return check_text(content, "content")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            raise UnreadableRowError("images, video or sound")
    return "".join(check_text(part.get("text"), "content") for part in content)


def with_arguments(rows: Any, prepared: Any) -> Any:
    """The tokenised rows of a trainer's loader with the columns that the loader leaves out, where
    arguments for the chat template are among those; else as they are.

    Args:
        rows: What the loader reads.
        prepared: The trainer's own data set.
    """
    if not (isinstance(rows, Dataset) and isinstance(prepared, Dataset)):
        return rows
    whole, ids = unformatted(prepared), "input_ids"
    names = set(whole.column_names) - set(rows.column_names)
    if _ARGUMENTS not in names or ids not in rows.column_names or len(rows) != len(whole):
        return rows
    read = unformatted(rows)
    alike = len(whole) > 0 and ids in whole.column_names and read[0][ids] == whole[0][ids]
    return whole if alike else rows


def own_template(row: Row) -> str | None:
    """The chat template, or the name of one, that a row has among its arguments for it: TRL writes
    the row with that. None where it has none.
    """
    value = _mapping(row.get(_ARGUMENTS))
    own = value.get(_TEMPLATE) if isinstance(value, Mapping) else None
    return own if own and is_unicode(own) else None


def _mapping(value: Any) -> Any:
    """What a column holds: a mapping, or what its JSON says."""
    if isinstance(value, str) and value:
        with suppress(ValueError, RecursionError):
            return read_json(value)
    return value


def sorted_arguments(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments for the chat template in a row's column, or of a trainer: those that the setting
    of this name can hold, and the others, as lists and documents are. A template is neither.

    Raises:
        UnreadableRowError: It is no mapping, nor the JSON of one.
    """
    value = _mapping(value) or {}
    if not isinstance(value, Mapping):
        raise UnreadableRowError("`chat_template_kwargs` that are no arguments for a chat template")
    given = {k: plain(v) for k, v in value.items() if v is not None and k != _TEMPLATE}
    held = {k: v for k, v in given.items() if is_template_options({k: v})}
    return held, {k: v for k, v in given.items() if k not in held}


def template_arguments(value: Any) -> dict[str, Any]:
    """The arguments for the chat template in a row's column, or of a trainer: a mapping, its JSON,
    or nothing. A template among them is left out, see `own_template`.

    Raises:
        UnreadableRowError: They are none that the setting of this name could be.
    """
    value = _mapping(value)
    if isinstance(value, Mapping):
        value = {k: v for k, v in value.items() if k != _TEMPLATE or not is_unicode(v)}
        # Arrow fills up with null what other rows have, whatever its name
        value = {
            name: each
            for name, each in value.items()
            if each is not None or is_template_options({name: each})
        }
    if value and not is_template_options(value):
        raise UnreadableRowError("`chat_template_kwargs` that are no arguments for a chat template")
    return value or {}


def _tools(row: Row) -> dict[str, Any]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools:  # data sets of tools keep their schemas as JSON
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UnreadableRowError("tools are not JSON") from error
    return {"tools": tools} if tools else {}
