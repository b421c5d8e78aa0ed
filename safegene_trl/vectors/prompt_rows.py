"""What the prompts that come with a safety vector are for, told by their rows' fields.

`verdict` says what the aligned model itself does with a prompt; without one it refuses a harmful
prompt and answers a benign one. Rows whose `use` is `measure` are prompts of another source, to
measure on and not to learn from.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args


Verdict = Literal["refused", "answered"]
Part = Literal["harmful", "benign", "border", "measure"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
MEASURE = "measure"
ANSWER_TOKENS = 48  # of a stored answer, at most, where a vector's maker has not asked for more
_Row = TypeVar("_Row", bound=Mapping[str, Any])
EXPECTED: Mapping[str, Verdict] = {"harmful": "refused", "benign": "answered"}


def verdict_of(row: Mapping[str, Any]) -> Verdict:
    """What the aligned model does with a row's prompt."""
    found: Verdict = row.get("verdict", EXPECTED[row["kind"]])
    return found


def part_of(row: Mapping[str, Any]) -> Part:
    """What a row is for: `harmful` prompts with refusals, `benign` ones with answers, `border` ones,
    which are benign and which the aligned model refuses, or those to `measure` on.
    """
    if row.get("use") == MEASURE:
        return "measure"
    if row["kind"] == "harmful":
        return "harmful"
    return "border" if verdict_of(row) == "refused" else "benign"


def rows_of(rows: Iterable[_Row], *parts: Part) -> list[_Row]:
    """The rows of some parts, in their order."""
    return [row for row in rows if part_of(row) in parts]
