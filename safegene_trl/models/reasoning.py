"""Reasoning before an answer: where a chat template puts it, where the answer begins, and what of a
model's text is the answer. The one place in which reasoning is read.

A template opens the reasoning in its prompt (DeepSeek-R1, Qwen3-Thinking), leaves it to the model
(Qwen3, gpt-oss), or closes it (Qwen3 with `enable_thinking=False`). It is one of a reasoning model
if it names the mark at which the answer begins; for every other one nothing here changes anything.

Nothing here needs torch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SafetyTarget = Literal["answer", "reasoning"]
REASONING_TOKENS = 1024  # where thinking cannot be turned off and nobody says how many
MOSTLY = 0.5  # share of unfinished answers from which on the others say too little of a model
# Reasoning beside the content of a message, under the names that templates read.
REASONING_KEYS = ("reasoning_content", "thinking")
PROBE = [{"role": "user", "content": "zqaskzq"}]
_ANSWER = "zqanswerzq"


@dataclass(frozen=True)
class Reply:
    """What a model wrote.

    Attributes:
        answer: What comes after the reasoning, all of it where there is none; empty where the
            reasoning did not end.
        reasoning: None where there is none.
        finished: Whether the reasoning ended.
    """

    answer: str
    reasoning: str | None = None
    finished: bool = True

    def __str__(self) -> str:
        """Reasoning and answer as most models write them, whatever the marks of this one are."""
        if not self.reasoning:
            return self.answer
        return f"{_THINK.opening}{self.reasoning}{_THINK.closing}{self.answer}"


@dataclass(frozen=True)
class ReasoningFormat:
    """How a family of models writes its reasoning.

    Attributes:
        name: Text that a template of the family holds.
        begin: The mark that reasoning begins with.
        end: The mark at which the answer begins.
        opening: All that stands before the reasoning.
        closing: All that stands between reasoning and answer.
        skipping: All that stands before an answer without reasoning.
        marks: What belongs to the format in a text, and neither to reasoning nor to an answer.
        ends: `end` in every form in which a model may write it.
    """

    name: str
    begin: str
    end: str
    opening: str
    closing: str
    skipping: str
    marks: re.Pattern[str]
    ends: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "ReasoningFormat | None":
        """That of a tokenizer's chat template, None where it is of no reasoning model."""
        template = str(tokenizer.chat_template or "")
        return next((each for each in _FORMATS if each.name in template), None)

    def place(self, prompt: str) -> SafetyTarget | None:
        """What a model writes first after a prompt, None where that is left to it."""
        end = prompt.rstrip()
        if end.endswith(self.end):
            return "answer"
        return "reasoning" if end.endswith(self.opening.rstrip()) else None

    def split(self, text: str, place: SafetyTarget | None = None) -> Reply:
        """What is reasoning and what is answer in a model's text.

        Args:
            text: With the marks of the format.
            place: Where the prompt ended. Where that was not in the reasoning, a text that does not
                begin with reasoning itself is an answer as a whole, whatever marks come later.
        """
        begins = text.lstrip().startswith(self.begin)
        end = self.ends.search(text)
        if place != "reasoning" and not begins:
            return Reply(self._plain(text))
        if end:
            return Reply(self._plain(text[end.end() :]), self._plain(text[: end.start()]))
        return Reply("", self._plain(text), finished=False)

    def continuation(self, reply: Reply, thinks: bool) -> str:
        """What a model writes of a reply after a prompt that ends in the reasoning (`thinks`) or at
        the answer; an answer without reasoning stands in the reasoning itself.
        """
        if thinks and reply.reasoning:
            return f"{reply.reasoning}{self.closing}{reply.answer}"
        return reply.answer

    def _plain(self, text: str) -> str:
        return self.marks.sub("", text).strip()


def _between(begin: str, end: str) -> ReasoningFormat:
    opening, closing = f"{begin}\n", f"\n{end}\n\n"
    marks = re.compile(rf"\A\s*{re.escape(begin)}")
    ends = re.compile(re.escape(end))
    return ReasoningFormat(end, begin, end, opening, closing, opening + closing, marks, ends)


_THINK = _between("<think>", "</think>")
_FINAL = "<|channel|>final<|message|>"
_CHANNELS = ReasoningFormat(  # of gpt-oss
    name="<|channel|>",
    begin="<|channel|>",
    end=_FINAL,
    opening="<|channel|>analysis<|message|>",
    closing=f"<|end|><|start|>assistant{_FINAL}",
    skipping=_FINAL,
    marks=re.compile(r"<\|(?:start|channel|constrain)\|>[^<]*|<\|(?:message|end)\|>"),
    # an answer in JSON says so before it begins
    ends=re.compile(r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"),
)
_FORMATS = (_CHANNELS, _THINK, _between("[THINK]", "[/THINK]"))


def split_stored(text: str) -> Reply:
    """What is reasoning and what is answer in a text of a data set or a vector: only one that
    begins with a mark has reasoning.
    """
    begun = text.lstrip()
    found = next((each for each in _FORMATS if begun.startswith(each.begin)), None)
    return Reply(text) if found is None else found.split(text)


@dataclass(frozen=True)
class PromptStyle:
    """How prompts are put to a model.

    Attributes:
        options: Arguments for the chat template, e.g. `{"enable_thinking": False}`.
        start: What the model is to write first: `template` leaves it to the template, `answer` puts
            an empty reasoning before the answer, `reasoning` opens one. Templates of models without
            reasoning know only the first.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    start: Literal["template", "answer", "reasoning"] = "template"

    def rendered(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: list[dict[str, Any]],
        generation: bool = False,
    ) -> str:
        """A conversation as the chat template writes it, up to where the assistant speaks if
        `generation`.
        """
        arguments = dict(self.options) | ({"add_generation_prompt": True} if generation else {})
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))

    def prompt(self, tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]]) -> str:
        """A prompt as the chat template writes it, up to where the model goes on."""
        prompt = self.rendered(tokenizer, messages, generation=True)
        written = ReasoningFormat.of(tokenizer)
        if written is None or self.start == "template" or written.place(prompt) == "answer":
            return prompt
        opened = written.place(prompt) == "reasoning"
        if self.start == "reasoning":
            return prompt if opened else prompt + written.opening
        turn = {"role": "assistant", "content": _ANSWER}
        head = self.rendered(tokenizer, [*messages, turn]).partition(_ANSWER)[0]
        # What the template itself writes before an answer counts, where it goes on from the prompt.
        if head.startswith(prompt) and not (opened and written.place(head) != "answer"):
            return head
        return prompt + (written.closing if opened else "")


AS_TEMPLATE = PromptStyle()


@dataclass(frozen=True)
class Answering:
    """How a model is asked for answers, and how they are read.

    Attributes:
        style: Of the prompts.
        max_reasoning_tokens: What is generated for the reasoning, on top of what an answer may
            have.
        written: How its reasoning is written, None for a model without.
        place: Where the prompts end.
    """

    style: PromptStyle = AS_TEMPLATE
    max_reasoning_tokens: int = 0
    written: ReasoningFormat | None = None
    place: SafetyTarget | None = None

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        options: Mapping[str, Any],
        max_reasoning_tokens: int | None,
    ) -> "Answering":
        """The way that a template allows.

        Args:
            tokenizer: The model's.
            options: Arguments for its chat template.
            max_reasoning_tokens: 0 puts an empty reasoning before every answer; more lets the model
                think. None does the first where the template can, the second where it cannot.
        """
        plain = PromptStyle(options)
        written = ReasoningFormat.of(tokenizer)
        if written is None:
            return cls(plain)
        without = PromptStyle(options, "answer")
        place, closed = (
            written.place(style.prompt(tokenizer, PROBE)) for style in (plain, without)
        )
        if place == "answer":
            return cls(plain, 0, written, place)
        if max_reasoning_tokens is None:
            can_leave_out = place is None and closed == "answer"
            max_reasoning_tokens = 0 if can_leave_out else REASONING_TOKENS
        if max_reasoning_tokens == 0:
            return cls(without, 0, written, closed)
        return cls(plain, max_reasoning_tokens, written, place)

    def ignores(self, asked: int | None, setting: str) -> str:
        """One sentence where a number of reasoning tokens that somebody asked for changes nothing;
        else empty.

        Args:
            asked: The number.
            setting: Its name.
        """
        if not asked or self.max_reasoning_tokens:
            return ""
        return (
            f"`{setting}` is {asked} and changes nothing: the chat template, with the arguments it is given, lets the model "
            "write no reasoning."
        )

    def no_room(self, room: float, context: int, setting: str, what: str = "prompt") -> ConfigError:
        """The error where no prompt leaves room for the reasoning.

        Args:
            room: Tokens that the shortest prompt leaves.
            context: The model's context length in tokens.
            setting: Name of the number of reasoning tokens.
            what: Which prompts they are.
        """
        return ConfigError(
            f"`{setting}` is {self.max_reasoning_tokens}, and the model's context of {context} tokens has "
            f"no room for it after any {what}: set it to {int(room)} or less."
        )

    def lacks_room(
        self, prompts: Sequence[int], context: int | None, answer: int, setting: str
    ) -> str:
        """One sentence where some prompts leave the model's context no room for the reasoning; else
        empty.

        Args:
            prompts: Their lengths in tokens.
            context: The model's context length in tokens, None if it has no limit.
            answer: Tokens that an answer may have.
            setting: Name of the number of reasoning tokens.

        Raises:
            ConfigError: No prompt leaves room for it, and one would for less.
        """
        if not self.max_reasoning_tokens or context is None:
            return ""
        rooms = [room_to_reason(length, context, answer) for length in prompts]
        without = sum(room < self.max_reasoning_tokens for room in rooms)
        if without == len(rooms) and max(rooms, default=0) > 0:
            raise self.no_room(max(rooms), context, setting)
        if not without:
            return ""
        return (
            f"{without} of {len(rooms)} prompts leave the model's context of {context} tokens no room for `{setting}` "
            f"({self.max_reasoning_tokens}) and the answer: what it writes beyond says little of it; set it lower, or leave those prompts out."
        )

    def read(self, text: str) -> Reply:
        """What is reasoning and what is answer in the text of an answer."""
        return Reply(text) if self.written is None else self.written.split(text, self.place)

    @property
    def record(self) -> dict[str, Any]:
        """What a reader must know of it; empty where a model is asked plainly."""
        found: dict[str, Any] = {}
        if self.style.options:
            found["chat_template_kwargs"] = dict(self.style.options)
        if self.written is not None:
            found["max_reasoning_tokens"] = self.max_reasoning_tokens
        return found


def room_to_reason(prompt: int, context: int | None, answer: int) -> float:
    """Tokens that a model's context has left for reasoning, between a prompt and an answer of these
    lengths; infinite without a limit.
    """
    return math.inf if context is None else context - prompt - answer
