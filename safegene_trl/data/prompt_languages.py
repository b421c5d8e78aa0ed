"""Which language a prompt is in: as its set says, else as its text shows."""

from collections.abc import Mapping
from contextlib import suppress

from ..judges.languages import languages_of
from .row_names import RowNames
from .rows import UnreadableRowError, prompt_of
from .sources import load_rows


def known_languages(source: str, split: str) -> dict[str, str]:
    """The language of every prompt of a set that has a column `language`, by its text.

    Args:
        source: The data set: local file or hub id.
        split: Split of a hub data set.

    Raises:
        CalibrationDataError: The data cannot be read.
    """
    rows = load_rows(source, split)
    if "language" not in rows.column_names:
        return {}
    found = RowNames("language")
    for row in rows:
        with suppress(UnreadableRowError):
            found.add(prompt_of(row)[-1]["content"], row["language"])
    found.tell(source)
    return {str(prompt): name for prompt, name in found.of.items()}


def language_of(text: str, known: Mapping[str, str]) -> str | None:
    """The language that a set names for a prompt, else the one that its text shows; None where it
    may be of several, or is one that is not known.

    Args:
        text: The prompt.
        known: As from `known_languages`.
    """
    if text in known:
        return known[text]
    told = languages_of(text)
    return told[0] if len(told) == 1 else None
