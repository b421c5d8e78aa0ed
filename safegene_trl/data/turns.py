"""Where the assistant speaks in a row of token ids, told by what its chat template puts around a
reply.

A few probe conversations with known contents are rendered and tokenised. What stands before and
after the contents are the template's marks. They count only if with them every reply of the probes
is found, and nothing else.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .spelling import (
    SPACES,
    UNIT,
    WHITE,
    Speller,
    Spelling,
    common_prefix,
    special_units,
    units,
    without_white_after,
    without_white_before,
)


Span = tuple[int, int]  # first token and the one after the last
_SYSTEM, _ASKED, _SAID = "zqsystemzq", ("zqaskonezq", "zqasktwozq"), ("zqsayonezq", "zqsaytwozq")


class TurnMarks:
    """What a chat template puts around replies.

    Attributes:
        header: What stands before a reply, as a tokenizer spells it.
        start: What every conversation begins with and nothing else holds, None if there is no such
            thing.
        system: What every conversation with a system turn begins with and nothing else holds, or
            None.
        ends: Ids of the tokens that end a reply.
    """

    def __init__(self, speller: Speller, probes: "_Probes"):
        self._speller = speller
        self.header = _header(probes)
        self.ends, self._end_is_said = _ends(probes, speller)
        self._heads = [head for head in (probes.head, probes.system_head) if head]
        self.start = self.system = None
        common = common_prefix(self._heads)
        if "\0" in common and probes.text.count(common) == 1:
            first = units(common)[0]  # alone where it will do: a date may follow
            self.start = first if "\0" in first and probes.text.count(first) == 1 else common
        elif (
            probes.system_text.count(probes.system_head) == 1
            and probes.system_head not in probes.text
        ):
            self.system = probes.system_head
        self._learn_neighbours(probes)

    def _learn_neighbours(self, probes: "_Probes") -> None:
        """What stands before a header and after a reply, by which a header is told from one that
        somebody has written.

        For example, with special tokens as `<…>` and line ends as `⏎`, of ChatML, which writes
        `<im_start>user⏎A<im_end>⏎<im_start>assistant⏎B<im_end>⏎`, and of Mistral's first template,
        `<s>[INST] A [/INST] B</s>` with `[INST]` as plain text:

        - `header`: `<im_start>assistant⏎`; ` [/INST]`.
        - `_closers`, which end turns: `<im_end>`; `</s>`, and `<s>`, which begins a row.
        - `_lead_is_marked`, whether one of them stands before every header: yes, the user's
          `<im_end>`; no.
        - `_speaks`, the header without them: `<im_start>assistant⏎`; `[/INST]`.
        - `_speaks_after_end`, whether a header may follow the end of a turn: yes; no.
        - `_next_is_marked`, whether the turn after a reply begins with a mark: yes,
          `<im_start>user⏎`; yes, `[INST]`.
        - `_heads_as_text`, such beginnings that are no special tokens: none; `[INST]`, `[/INST]`.
        """
        lead = special_units(common_prefix(probes.before_reply).rpartition(self.header)[0])
        ends = [
            name for text in (probes.after_reply, probes.tail) for name in special_units(text)[:1]
        ]
        begins = {f"\0{self._speller.bos}\0"} - set(special_units(self.header + probes.after_reply))
        self._closers = tuple({*lead, *(ends if self._end_is_said else ()), *begins})
        self._lead_is_marked = bool(lead)
        self._speaks_after_end = bool(lead) or self.header.startswith(self._closers)
        self._speaks = self.header
        while self._speaks.startswith(self._closers):
            self._speaks = without_white_before(UNIT.sub("", self._speaks, count=1))
        self._speaks = without_white_before(self._speaks)
        turn = without_white_before(
            UNIT.sub("", without_white_before(probes.after_reply), count=1)
            if self._end_is_said
            else probes.after_reply
        )
        turn = re.split(r"\d", turn)[0]  # rounds may be numbered
        self._next_is_marked = bool(turn)
        heads = (
            without_white_after(without_white_before(text))
            for text in (turn, *self._heads, self._speaks)
        )
        self._heads_as_text = tuple(head for head in heads if head and not head.startswith("\0"))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TurnMarks | None":
        """Those of a tokenizer's template, None where they cannot be told with certainty."""
        speller = Speller(tokenizer)
        try:
            marks = cls(speller, _Probes(tokenizer, speller))
            return (
                marks
                if marks.header and all(marks._finds(tokenizer, *probe) for probe in _checks())
                else None
            )
        except (
            Exception
        ):  # a template may refuse a conversation in any way it likes; then nothing is certain
            return None

    def spelled(self, ids: Sequence[int]) -> Spelling:
        """The ids as the text in which marks are looked for."""
        return self._speller(ids)

    def is_chat(self, spelled: Spelling) -> bool:
        """Whether the row holds any mark of the template: then it is no plain text."""
        return any(part in spelled.text for part in (self.header, *self._heads))

    def begins(self, spelled: Spelling) -> bool:
        """Whether the row begins where a conversation does."""
        return spelled.text.startswith((self.start,) if self.start else tuple(self._heads))

    def first_head(self, spelled: Spelling) -> int:
        """The first token at which a conversation, or an exchange of one, may begin; the row's
        length if there is none.
        """
        found = [spelled.text.find(head) for head in self._heads]
        return spelled.token_after(min((at for at in found if at >= 0), default=len(spelled.text)))

    def starts(self, spelled: Spelling) -> list[int]:
        """Tokens at which a conversation certainly begins."""
        mark = self.start or self.system
        return [spelled.token_after(at) for at in spelled.find(mark)] if mark else []

    def replies(self, spelled: Spelling) -> list[Span] | None:
        """Spans of the replies, each with the token that ends its turn; a reply cut short ends with
        the row.

        Returns:
            None where the headers do not fit the turns, so that it cannot be told which are real: a
                reply holds the header of
            another, a header stands in the midst of a turn, or what ends a reply does. Somebody has
                written the marks.
        """
        headers = spelled.find(self.header)
        spans: list[Span] = []
        for number, at in enumerate(headers):
            first = spelled.token_after(at + len(self.header))
            end = next(
                (i for i in range(first, len(spelled.ids)) if spelled.ids[i] in self.ends), None
            )
            after = len(spelled.ids) if end is None else end + self._end_is_said
            following = headers[number + 1] if number + 1 < len(headers) else len(spelled.text)
            reach = spelled.starts[end] if end is not None else len(spelled.text)
            if following < reach or not self._is_led(spelled.text[:at]):
                return None
            if end is not None and not self._is_followed(spelled.text[spelled.starts[end] :]):
                return None
            if after > first:
                spans.append((first, after))
        return spans

    def _is_led(self, before: str) -> bool:
        """Whether a turn ends where a header begins, as far as the template marks the ends of turns
        before it.
        """
        if not self._lead_is_marked:
            return True
        closing = without_white_after(before)
        # a row may begin in the midst of a packed conversation, with the rest of a turn's end
        return not closing or closing.endswith(self._closers)

    def _is_followed(self, rest: str) -> bool:
        """Whether, after the mark that ends a reply and begins this text, another turn begins or
        nothing follows.

        For example (signs as in `_learn_neighbours`): of ChatML `<im_end>⏎<im_start>user⏎…` and
        `<im_end>` are followed rightly, and `<im_end> ends a turn` is not: somebody wrote the mark
        within a reply. Of Mistral `</s>[INST] …` is, also where the row is cut at `</s>[IN`, and
        `</s> and more` is not.
        """
        if self._end_is_said:
            rest = UNIT.sub("", rest, count=1)
        rest, closed = without_white_before(rest), False
        while rest.startswith((*self._closers, *self._speller.filling)):
            rest, closed = without_white_before(UNIT.sub("", rest, count=1)), True
        if not rest.startswith("\0"):
            begins = any(
                rest.startswith(head) or head.startswith(rest) for head in self._heads_as_text
            )
            return begins or not rest or not (self._next_is_marked or closed)
        # The end of the user's turn and a reply: the reply before was a part of that turn. Two
        # replies in a row are one too, where nothing marks the end of the turn before a reply.
        return not rest.startswith(self._speaks) or (self._speaks_after_end and not closed)

    def after_reply(self, spelled: Spelling, span: Span) -> int:
        """The token at which the turn after a reply begins, white space between the two left out."""
        token = span[1]
        while token < len(spelled.ids) and WHITE.fullmatch(
            self._speller([spelled.ids[token]]).text
        ):
            token += 1
        return token

    def _finds(
        self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], said: list[str]
    ) -> bool:
        """Whether every reply of a conversation is found, and nothing beside the replies."""
        spelled = self._speller(rendered(tokenizer, messages))
        spans = self.replies(spelled)
        if spans is None or len(spans) != len(said) or not self.begins(spelled):
            return False
        texts = [self._speller(spelled.ids[first:after]).text for first, after in spans]
        names = (_SYSTEM, *_ASKED, *_SAID)
        return all(
            [n for n in names if n in text] == [own] for text, own in zip(texts, said, strict=True)
        )


class _Probes:
    """The template's text around the contents of a conversation of two exchanges, with and without
    a system turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, speller: Speller):
        self.text = speller(rendered(tokenizer, _exchange())).text
        cuts = re.split("|".join((*_ASKED, *_SAID)), self.text)
        if len(cuts) != 5:
            raise ValueError("the template leaves turns out")
        self.head, *between, self.tail = cuts
        self.before_reply, self.after_reply = [between[0], between[2]], between[1]
        self.generation = _generation_prompt(tokenizer, speller)
        self.system_text = self.system_head = ""
        try:
            text = speller(
                rendered(tokenizer, [{"role": "system", "content": _SYSTEM}, *_exchange()])
            ).text
        except Exception:  # templates that allow no system turn raise errors of many kinds
            return
        if _SYSTEM in text:
            self.system_text, self.system_head = text, text.split(_SYSTEM)[0]


def _exchange() -> list[dict[str, str]]:
    turns = [text for pair in zip(_ASKED, _SAID, strict=True) for text in pair]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def _checks() -> list[tuple[list[dict[str, str]], list[str]]]:
    """Conversations of one and two exchanges with awkward contents, and what the assistant says in
    them.
    """
    two = _exchange()
    awkward = [{**turn, "content": f"1) {turn['content']}.\n\n- So?"} for turn in two]
    return [(two[:2], [_SAID[0]]), (two, list(_SAID)), (awkward, list(_SAID))]


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> list[int]:
    """The ids of a conversation as the chat template writes it."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, **options
    )
    return list(encoded["input_ids"])


def _generation_prompt(tokenizer: PreTrainedTokenizerBase, speller: Speller) -> str:
    """What the template adds where the assistant is to speak; empty where it adds nothing."""
    turn = [{"role": "user", "content": _ASKED[0]}]
    without = speller(rendered(tokenizer, turn)).text
    text = speller(rendered(tokenizer, turn, add_generation_prompt=True)).text
    return text.removeprefix(without) if text.startswith(without) else ""


def _header(probes: _Probes) -> str:
    """What stands before every reply, whoever spoke before it, without spaces that a reply's first
    token may take in.
    """
    common, prompt = units(common_prefix(probes.before_reply)), probes.generation
    rests = ["".join(common[i:]) for i in range(len(common))]
    if prompt:
        rests = [rest for rest in rests if rest.startswith(prompt) or prompt.startswith(rest)]
    return rests[0].rstrip(SPACES) if rests else ""


def _ends(probes: _Probes, speller: Speller) -> tuple[frozenset[int], int]:
    """Ids of the tokens that end a reply, and 1 if they are the reply's own, 0 if they begin the
    next turn.
    """
    ends = [_leading_special(probes.after_reply, speller)]
    # the next turn's first token ends the reply: any special token may be it
    if WHITE.fullmatch(probes.tail):
        return frozenset(speller.special), 0
    ends.append(_leading_special(probes.tail, speller))
    return frozenset(ends), 1


def _leading_special(text: str, speller: Speller) -> int:
    found = units(without_white_before(text))
    if not found or not found[0].startswith("\0"):
        raise ValueError("no special token ends a reply")
    return speller.id_of(found[0].strip("\0"))
