"""A few answers before and after the step that a person can read, for the report.

A report may be published beside its checkpoint. So only prompts that the vector itself carries are
shown, and nothing that a model says to a harmful one but the words by which the judge knows a
refusal: what stands before or behind them may be the answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from ..data.prompts import Prompt
from ..judges.refusal_phrases import words_of_refusal


MOST_CHARACTERS = 200
_CHANGES = (  # kind of prompt, refused before, refused afterwards: in turn one of each
    ("harmful", False, True),
    ("benign", False, False),
    ("benign", False, True),
    ("harmful", False, False),
    ("harmful", True, False),
    ("benign", True, False),
    ("harmful", True, True),
    ("benign", True, True),
)


@dataclass(frozen=True)
class Answered:
    """What a model says to a prompt, and what the judge calls it."""

    answer: str
    label: str


def examples(
    prompts: Mapping[str, Sequence[Prompt]],
    before: Mapping[str, Sequence[Answered]],
    after: Mapping[str, Sequence[Answered]],
    count: int,
) -> list[dict[str, Any]]:
    """Up to `count` prompts with the answers before and after, the first of each kind of change in
    turn: the choice does not look at whether the step did well.

    Args:
        prompts: Those that may be shown, by kind.
        before: The fine-tune's answers to them, in their order.
        after: Those of the model with the vector.
        count: How many are wanted.

    Returns:
        Of each its `kind`, the `prompt` and, `before` and `after`, the judge's `label` and the
        `text` of at most 200 characters; None in place of what is no refusal of a harmful prompt.
    """
    groups: list[list[dict[str, Any]]] = [[] for _ in _CHANGES]
    for kind, own in prompts.items():
        for prompt, first, second in zip(own, before[kind], after[kind], strict=True):
            change = (kind, first.label == "refused", second.label == "refused")
            sides = {"before": _shown(kind, first), "after": _shown(kind, second)}
            groups[_CHANGES.index(change)].append(
                {"kind": kind, "prompt": _cut(prompt.text), **sides}
            )
    return list(_in_turn(groups))[:count]


def _in_turn(groups: Sequence[Sequence[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    return (one for one in chain.from_iterable(zip_longest(*groups)) if one is not None)


def _shown(kind: str, found: Answered) -> dict[str, str | None]:
    if kind != "harmful":
        return {"label": found.label, "text": _cut(found.answer)}
    words = words_of_refusal(found.answer) if found.label == "refused" else None
    return {"label": found.label, "text": None if words is None else _cut(f"{words} …")}


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1].rstrip()}…"
