"""Samples of a training set, read as its trainer reads them: which tokens are the assistant's
words.

A row is one of these, and its response tokens are:

- tokens with labels or a mask that leave the prompt out: the tokens that they keep. TRL makes such
  labels of prompts with completions, and of messages with `assistant_only_loss`.
- tokens without them (labels equal to the tokens, as TRL makes of `messages` by default): each
  reply of the assistant with the token that ends its turn, found by the marks of the chat template.
- a preference: the answer that is preferred. An answer that KTO marks as undesirable is skipped.
- a conversation, not yet tokenised: the replies of `messages`, else the completion, with the token
  that ends the turn.
- plain text: every token, as every token is trained on.

Packed rows are split at their boundaries first, and every part is a sample of its own.

A row that brings a chat template along (`chat_template` among its `chat_template_kwargs`) is read
by the marks of that, as TRL writes it with that.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import PreTrainedTokenizerBase

from ..errors import CalibrationDataError
from ..models.inputs import Sample, shortened, tokenize
from ..models.reasoning import AS_TEMPLATE, REASONING_KEYS, PromptStyle
from ..models.template_names import unread_names
from .rows import (
    Conversation,
    Message,
    Row,
    Skipped,
    UnreadableRowError,
    check_desirable,
    check_text,
    drawn,
    holds_no_answer,
    is_unicode,
    own_template,
    plain,
    read_conversation,
    stream,
    unformatted,
)
from .spelling import Spelling
from .token_rows import (
    Padding,
    holds_tokens,
    is_ids,
    leaves_out,
    preferred,
    prompt_length,
    tokens,
)
from .turns import Span, TurnMarks, rendered


MOST_ROWS = 2000  # read at most so many, or twenty times as many as are needed
LABELS, TEMPLATE, TEXT = "labels", "chat template", "text"  # by which the response was told
_REMEDY = (
    "set `data.task_data` to the messages before tokenising, or train with `assistant_only_loss`"
)


class TrainingSamples:
    """Reads samples from the rows of a training set.

    Args:
        rows: Map-style data set, stream (of datasets or torch), or list of rows, as the trainer
            holds it or raw.
        tokenizer: The model's.
        source: What the data set is called in messages.
        packed: Whether rows hold several samples without saying where each begins (TRL's packing
            strategy `wrapped`); None where that is not known: then it is told from the rows.
        template_options: Arguments for the chat template, for rows that name none and are not yet
            tokenised.

    Attributes:
        skipped: How many rows or parts of packed rows were left out, by reason.
        read_by: How many samples had their response told by `labels`, `chat template`, or are plain
            `text`.
        own_templates: How many are of rows that bring their chat template along.
        unread: How many rows have arguments that their chat template never reads, which changes
            nothing in them, by what there is to say of those.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: PreTrainedTokenizerBase,
        source: str = "training set",
        packed: bool | None = None,
        template_options: Mapping[str, Any] | None = None,
    ):
        self._style = PromptStyle(template_options or {})
        self._rows, self._tokenizer, self._source = unformatted(rows), tokenizer, source
        self._marks = TurnMarks.of(tokenizer) if tokenizer.chat_template else None
        pad, ends = tokenizer.pad_token_id, self._marks.ends if self._marks else frozenset()
        self._padding = Padding(
            pad, pad in ends | {tokenizer.eos_token_id}, pad in _beginnings(tokenizer)
        )
        self._packed, self._is_chat = packed, False
        self._others: dict[str, TrainingSamples] = {}  # by the chat template that rows bring along
        self.skipped = Skipped()
        self.read_by: Counter[str] = Counter()
        self.own_templates = 0
        self.unread: Counter[str] = Counter()

    def take(
        self, count: int, seed: int, max_length: int | None, max_response_tokens: int
    ) -> list[Sample]:
        """Up to `count` samples, in seeded random order; from a stream, its first ones.

        Every sample is cut to its first `max_length` tokens and of these to its first response
        tokens.

        Raises:
            CalibrationDataError: Fewer than two rows can be read, or it cannot be told which tokens
                are a response.
        """
        drawn = itertools.islice(self._drawn(count, seed), max(MOST_ROWS, 20 * count))
        first = list(itertools.islice(drawn, count))
        self._look_at(first)
        found: list[Sample] = []
        seen = 0
        for row in itertools.chain(first, drawn):
            seen += 1
            how, samples = self._read(row)
            for sample in samples[: count - len(found)]:
                cut = shortened(sample, max_length, max_response_tokens)
                if cut is None:
                    some = shortened(sample, None, max_response_tokens) is not None
                    within = " within `data.max_length`" if some else ""
                    self.skipped.add(UnreadableRowError(f"no response{within}"))
                else:
                    self.read_by[how] += 1
                    self.own_templates += own_template(row) is not None
                    found.append(cut)
            if len(found) == count:
                return found
        if len(found) < 2:
            raise CalibrationDataError(self._too_few(len(found), seen, first))
        return found

    def _drawn(self, count: int, seed: int) -> Iterator[Any]:
        """The rows in the order in which they are used, the first `count` as `random.sample` draws
        them.
        """
        rows = self._rows
        if isinstance(rows, IterableDataset | TorchIterableDataset) or not isinstance(rows, Sized):
            iterator = stream(rows, self._source)
        else:
            iterator = drawn(rows, count, seed)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # a data set may run any code of the user's
                raise CalibrationDataError(
                    f"A row of the {self._source} cannot be read ({type(error).__name__}: {error}): correct it, or set "
                    "`data.task_data`."
                ) from error
            yield row

    def _look_at(self, rows: Sequence[Any]) -> None:
        """Learns from the first rows what no single row tells: whether they are chat, and whether
        they are packed.
        """
        if self._marks is None:
            return
        rows = [plain(row) for row in rows if isinstance(row, Mapping)]
        rows = [row for row in rows if own_template(row) is None]
        held = [
            self._marks.spelled(ids)
            for ids in (row.get("input_ids") for row in rows)
            if is_ids(ids) and min(ids, default=0) >= 0
        ]
        texts = [row["text"] for row in rows if not held and is_unicode(row.get("text"))]
        self._is_chat = any(
            map(self._marks.is_chat, [*held, *(self._marks.spelled(self._ids(t)) for t in texts)])
        )
        if self._packed is None and held:
            whole = len(held) > 1 and all(map(self._marks.begins, held))
            self._packed = self._is_chat and not whole

    def _read(self, row: Any) -> tuple[str, list[Sample]]:
        """How the response was told, and the samples of one row; what cannot be read is counted."""
        try:
            if not isinstance(row, Mapping):
                raise UnreadableRowError("a row that is no mapping of columns")
            row = plain(row)
            check_desirable(row)
            if (own := own_template(row)) is not None:
                return self._with_template(own)._from_row(row)
            return self._from_row(row)
        except UnreadableRowError as error:
            self.skipped.add(error)
            return "", []

    def _with_template(self, own: str) -> "TrainingSamples":
        """What reads the rows that bring this chat template along."""
        if own not in self._others:
            tokenizer = copy.copy(self._tokenizer)
            tokenizer.chat_template = self._tokenizer.get_chat_template(own)
            other = TrainingSamples([], tokenizer, self._source, self._packed, self._style.options)
            other.skipped, other.unread, other._is_chat = self.skipped, self.unread, True
            self._others[own] = other
        return self._others[own]

    def _from_row(self, row: Row) -> tuple[str, list[Sample]]:
        return self._from_tokens(row) if holds_tokens(row) else self._from_text(row)

    def _from_tokens(self, row: Row) -> tuple[str, list[Sample]]:
        if (pair := preferred(row, self._padding)) is not None:
            return LABELS, [Sample(*pair)]
        ids, mask, cuts = tokens(row, self._padding)
        if not leaves_out(ids, mask, self._tokenizer.pad_token_id):
            mask = None
        elif not any(mask[1:]):  # type: ignore[index]
            raise UnreadableRowError("no response in its labels")
        if not cuts:
            return self._from_part(ids, mask, row, False)
        how, samples = LABELS, []
        for start, end in itertools.pairwise([0, *cuts, len(ids)]):
            try:
                how, found = self._from_part(
                    ids[start:end], None if mask is None else mask[start:end], row, True
                )
                samples += found
            except UnreadableRowError as error:
                self.skipped.add(error)
        return how, samples

    def _from_part(
        self, ids: list[int], mask: list[bool] | None, row: Row, is_whole: bool
    ) -> tuple[str, list[Sample]]:
        """Samples of one packed part (`is_whole`), or of a row that is not known to be packed."""
        if self._marks is None or not self._is_chat:
            return self._from_unmarked(ids, mask, row, is_whole)
        spelled = self._marks.spelled(ids)
        spans = self._marks.replies(spelled)
        whole = mask is None or _keeps_a_header(mask, spelled, self._marks)
        if whole and spans is None:
            raise UnreadableRowError("marks of replies that do not fit its turns")
        said = mask or []
        if whole:
            replies = _mask(len(ids), spans or [])
            said = (
                replies
                if mask is None
                else [kept and reply for kept, reply in zip(mask, replies, strict=True)]
            )
        bounds = {0, *self._marks.starts(spelled), len(ids)}
        begun = 0
        if self._packed and not is_whole and self._marks.start is None:
            ended = [span for span in spans or [] if said[span[1] - 1]]
            # what stands before belongs to a sample of another row
            begun = self._marks.first_head(spelled)
            bounds |= {begun, *(self._marks.after_reply(spelled, span) for span in ended)}
        parts = [
            Sample(ids[a:b], said[a:b])
            for a, b in itertools.pairwise(sorted(bounds))
            if a >= begun and any(said[a:b])
        ]
        if not parts:
            raise UnreadableRowError("no assistant turn")
        # its prompt is in another row
        if self._packed and not is_whole and parts[0].is_response[0]:
            self.skipped.add(UnreadableRowError("a reply cut off from its prompt"))
            parts = parts[1:]
        return (TEMPLATE if mask is None else LABELS), parts

    def _from_unmarked(
        self, ids: list[int], mask: list[bool] | None, row: Row, is_whole: bool
    ) -> tuple[str, list[Sample]]:
        """Samples of tokens that hold no mark of a chat template, or that are read without one."""
        if mask is None and self._marks is None and self._tokenizer.chat_template:
            return self._from_columns(ids, row)
        start = 0 if mask is not None else prompt_length(ids, row, self._tokenizer)
        said = [position >= start for position in range(len(ids))] if mask is None else mask
        how = LABELS if mask is not None or start else TEXT
        if is_whole or start:
            return how, [Sample(ids, said)]
        ends = [
            i + 1
            for i, token in enumerate(ids[:-1])
            if token == self._tokenizer.eos_token_id and said[i]
        ]
        bounds = sorted({0, *(end for end in ends if mask is None or not said[end]), len(ids)})
        if mask is not None and said[0] and (self._packed or len(bounds) > 2):
            self.skipped.add(UnreadableRowError("a reply cut off from its prompt"))
            bounds = bounds[1:]
        return how, [
            Sample(ids[a:b], said[a:b]) for a, b in itertools.pairwise(bounds) if any(said[a:b])
        ]

    def _from_columns(self, ids: list[int], row: Row) -> tuple[str, list[Sample]]:
        """Where the template's marks cannot be told: by the columns that the tokens were made of,
        if they are there.
        """
        start = prompt_length(ids, row, self._tokenizer)
        if start:
            return LABELS, [Sample(ids, [position >= start for position in range(len(ids))])]
        if any(row.get(name) for name in ("messages", "prompt", "conversations")):
            return self._from_text(row)
        raise CalibrationDataError(
            f"The {self._source} is tokenised without labels that leave prompts out, and the chat template does not tell "
            f"where a reply begins and ends: {_REMEDY}."
        )

    def _from_text(self, row: Row) -> tuple[str, list[Sample]]:
        text = row.get("text")
        if text is not None and not any(
            row.get(n) for n in ("prompt", "messages", "conversations", "chosen")
        ):
            if not check_text(text, "text"):
                raise UnreadableRowError("empty text")
            ids = self._ids(text)
            if self._marks and self._is_chat:
                return self._from_part(ids, None, row, True)
            return TEXT, [Sample(ids, [True] * len(ids))]
        whole = read_conversation(row)
        replies = whole.replies
        if not replies:
            raise UnreadableRowError("no assistant turn")
        return TEMPLATE, [self._from_conversation(whole, replies)]

    def _from_conversation(self, whole: Conversation, replies: list[int]) -> Sample:
        given = [name for name, value in whole.template.items() if value is not None]
        if unread := unread_names(self._tokenizer, given):
            self.unread[unread] += 1
        messages = whole.messages[: replies[-1] + 1]
        last = messages[-1]
        beside = any(last.get(key) for key in ("tool_calls", *REASONING_KEYS))
        if len(replies) > 1 or beside or whole.template:
            sample = self._from_all_replies(messages, whole)
            if sample is not None:
                return sample
        if not last["content"]:
            raise UnreadableRowError("empty reply")
        return templated(self._tokenizer, messages[:-1], last["content"], self._style)

    def _from_all_replies(
        self, messages: list[dict[str, Any]], whole: Conversation
    ) -> Sample | None:
        """Every reply of a conversation, None where the marks do not tell as many replies as there
        are.
        """
        if self._marks is None:
            return None
        with _template_errors():
            options = {**self._style.options, **whole.template}
            spelled = self._marks.spelled(rendered(self._tokenizer, messages, **options))
        spans = self._marks.replies(spelled)
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if spans is None or len(spans) != len(said):
            return None
        spans = [span for i, span in zip(said, spans, strict=True) if i >= whole.first]
        return Sample(spelled.ids, _mask(len(spelled.ids), spans))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def _too_few(self, found: int, seen: int, first: Sequence[Any]) -> str:
        """One sentence: what was read, what was skipped and why, what to do."""
        if (
            first
            and not found
            and all(isinstance(r, Mapping) and holds_no_answer(r) for r in first)
        ):
            return (
                f"The {self._source} holds prompts alone, and utility is measured on answers: set `data.task_data` to a data "
                "set with replies."
            )
        columns = sorted({str(name) for row in first if isinstance(row, Mapping) for name in row})
        return (
            f"The {self._source} has {found} usable samples in the {seen} rows that were read{self.skipped}: each needs a "
            f"response to measure utility on, and the columns are {columns}; give at least 2, or set `data.task_data` to a "
            "data set with replies."
        )


def templated(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    response: str,
    style: PromptStyle = AS_TEMPLATE,
) -> Sample:
    """As `tokenize`.

    Raises:
        UnreadableRowError: The chat template does not accept the conversation.
    """
    with _template_errors():
        return tokenize(tokenizer, messages, response, style)


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except (
        Exception
    ) as error:  # templates refuse roles, orders and contents with errors of many kinds
        raise UnreadableRowError(f"refused by the chat template ({_short(error)})") from error


def _mask(length: int, spans: Sequence[Span]) -> list[bool]:
    said = {token for first, after in spans for token in range(first, after)}
    return [token in said for token in range(length)]


def _keeps_a_header(mask: list[bool], spelled: Spelling, marks: TurnMarks) -> bool:
    """Whether a mask keeps the header of a reply, and so other turns than the assistant's."""
    for at in spelled.find(marks.header):
        header = range(spelled.token_after(at), spelled.token_after(at + len(marks.header)))
        if all(mask[token] for token in header):
            return True
    return False


def _beginnings(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, ...]:
    """Tokens that a row may begin with and mean: the first of all, and the last of a text that was
    cut off before it.
    """
    return tokenizer.bos_token_id, tokenizer.eos_token_id


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 80 else f"{text[:79]}…"
