"""What the rows of a data set call their prompts: the category of each, and its language."""

import logging
from collections.abc import Hashable
from unicodedata import normalize

from ..errors import CalibrationDataError
from ..text import one_line


logger = logging.getLogger(__name__)

_UNSEEN = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))  # take no place, and are in no name


class RowNames:
    """The names of the prompts of one data set; of a prompt whose rows name several the first.

    Args:
        column: `category` or `language`.

    Attributes:
        of: By prompt, its name.
    """

    def __init__(self, column: str):
        self._column = column
        self._several: set[Hashable] = set()
        self.of: dict[Hashable, str] = {}

    def add(self, prompt: Hashable, value: object) -> None:
        """What a row says of a prompt.

        Raises:
            CalibrationDataError: It is neither a text nor a number.
        """
        name = row_name(value, self._column)
        if name is not None and self.of.setdefault(prompt, name) != name:
            self._several.add(prompt)

    def tell(self, source: str) -> None:
        """Says how many prompts have several names."""
        if self._several:
            logger.warning(
                "%d prompts of %s have rows of more than one %s: the first counts.",
                len(self._several),
                source,
                self._column,
            )


def row_name(value: object, column: str = "category") -> str | None:
    """A row's category or language in one spelling: without space around it and characters that
    nobody sees, its characters composed, a language in small letters; None for an empty one.

    Raises:
        CalibrationDataError: It is neither a text nor a number.
    """
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise CalibrationDataError(
            f"A row has the {column} {one_line(value)[:60]}, which is neither a text nor a number: give each row one {column}, or name "
            "that column otherwise."
        )
    name = normalize("NFC", str(value)).translate(_UNSEEN).strip()
    return (name.casefold() if column == "language" else name) or None
