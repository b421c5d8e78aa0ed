"""Text and numbers that come from files, made inert for where they are shown: a terminal, Markdown,
JSON.

Names, reasons and categories are written by strangers. None of them may move a cursor, begin a
heading, load an image or end a string.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any


# Controls, formatting characters (those that turn the direction of text among them), surrogates,
# separators of lines and paragraphs.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SURROGATE = re.compile("[\ud800-\udfff]")
# What begins a span, link, image, HTML tag, entity, formula, table cell or heading wherever it
# stands.
_MARKS = re.compile(
    r"[\\`*\[\]<>|~&!$#]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|@", re.IGNORECASE
)
_FIRST = re.compile(r"[-+=]|\d{1,9}(?=[.)])")  # what begins a block at the head of a line


def printable(text: Any) -> str:
    """A text in one line in which every character can be seen; the others are written as Python
    writes them, e.g. `\\x1b`.
    """
    return "".join(_seen(character) for character in str(text))


def isolated(text: str) -> str:
    """The text with every run of letters that are written from right to left between U+2068 and
    U+2069, so that it turns none of the numbers and brackets around it.
    """
    found, run, after = [], "", ""
    for character in text:
        if unicodedata.bidirectional(character) in ("R", "AL", "AN"):
            run, after = run + after + character, ""
        elif run and unicodedata.bidirectional(character) not in ("L", "EN"):
            after += character  # between two words of the run, if another one follows
        else:
            found.append((f"\u2068{run}\u2069" if run else "") + after + character)
            run, after = "", ""
    return "".join(found) + (f"\u2068{run}\u2069" if run else "") + after


def one_line(text: Any) -> str:
    """A message of several lines as one, with all characters to be seen."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", str(text).strip()))


def printable_values(value: Any) -> Any:
    """JSON content in which every text, keys included, is `printable`."""
    if isinstance(value, Mapping):
        return {printable_values(key): printable_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable_values(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def markdown(text: Any) -> str:
    """A text that stands in Markdown, in a table's cell as well, and means nothing but itself
    there.
    """
    seen = _MARKS.sub(lambda found: "\\" + found[0], one_line(text))
    first = _FIRST.match(seen)
    if first is None:
        return seen
    end = first.end()
    return f"{seen[:end]}\\{seen[end:]}" if first[0].isdigit() else f"\\{seen}"


def code(text: Any) -> str:
    """A plain identifier or path as a Markdown code span; any other text as it is, inert."""
    return f"`{text}`" if re.fullmatch(r"[\w.:/@#+-]+", str(text), re.ASCII) else markdown(text)


def told_apart(first: float, second: float, digits: int = 3) -> tuple[str, str]:
    """Two numbers with `digits` decimals, or with as many more as it takes to see that they differ."""
    pairs = [(f"{first:.{n}f}", f"{second:.{n}f}") for n in range(digits, 17)]
    apart = (pair for pair in pairs if pair[0] != pair[1])
    # numbers that are one, and no numbers
    return pairs[0] if first == second else next(apart, (f"{first:.3g}", f"{second:.3g}"))


def read_json(text: str | bytes) -> Any:
    """What JSON holds, every number finite and of a size that a float has, as `strict_json` writes
    it.

    Raises:
        ValueError: It is no JSON, or a number is NaN, infinite or larger than a float can be.
        RecursionError: It is nested too deeply.
    """
    return json.loads(
        text, parse_constant=_no_number, parse_float=_finite_number, parse_int=_sized_integer
    )


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _finite_number(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        _no_number(digits[:20])
    return number


def _sized_integer(digits: str) -> int:
    _finite_number(digits)
    return int(digits)


def strict_json(value: Any, indent: int | None = 2) -> str:
    """JSON that every reader takes: in place of a number that is not finite stands null.

    JSON has no NaN and no infinity. An object that held some gets a key `not_finite` with the JSON
    pointers (RFC 6901) of all of them. Surrogates, which UTF-8 lacks, are escaped.
    """
    places: list[str] = []
    found = _finite(value, "", places)
    if places and isinstance(found, dict):
        found["not_finite"] = places
    text = json.dumps(found, indent=indent, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _finite(value: Any, place: str, places: list[str]) -> Any:
    """`value` with None for numbers that are not finite, whose places are added to `places`."""
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place)
        return None
    if isinstance(value, Mapping):
        return {
            key: _finite(item, f"{place}/{_pointer(key)}", places) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_finite(item, f"{place}/{index}", places) for index, item in enumerate(value)]
    return value


def _pointer(key: Any) -> str:
    return str(key).replace("~", "~0").replace("/", "~1")


def _seen(character: str) -> str:
    if unicodedata.category(character) in _HIDDEN:
        return character.encode("unicode_escape").decode()
    return character
