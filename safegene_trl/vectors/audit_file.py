"""`audit.json`: what an audit found a safety vector to restore, cell by cell; read with distrust, as
all that lies beside a vector.

Nothing here needs torch: a gate, a card and an extraction read it before anything is loaded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ConfigError, VectorError
from ..provenance import sha256_of_bytes
from ..text import printable, read_json


AUDIT_FILE = "audit.json"
AUDIT_VERSION = 1
MOST_BYTES = 2**26
MOST_PROMPTS = 100_000  # of some 300 bytes each
DIMENSIONS = ("category", "language", "form", "length")
CellVerdict = Literal["blind_spot", "unsure", "fine", "nothing_lost", "too_few"]
VERDICTS: tuple[str, ...] = get_args(CellVerdict)
MEASURES = ("restored", "reach")
SUMMARY = ("least", "mean", "largest")  # what is told of coefficients
ROLES = ("aligned", "fine_tune", "safeguarded")
MOST_TEXT = 300  # characters of a name
_MOST_CELLS = 10_000
_HASH, _KEY = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class AuditedCell:
    """What an audit says of one cell.

    Attributes:
        where: Its category, language, form or length, by name; several of them where they cross.
        verdict: What was found.
        prompts: How many were judged there.
        count: How many of them the share is of.
        share: What came back of the lost refusals, or what the vector reaches (0–1); None of none.
    """

    where: Mapping[str, str]
    verdict: str
    prompts: int
    count: int
    share: float | None

    @property
    def name(self) -> str:
        """For people, with every character to be seen: `category privacy, form story`."""
        return printable(", ".join(f"{key} {value}" for key, value in self.where.items()))


@dataclass(frozen=True)
class AuditRecord:
    """An audit that is whole.

    Attributes:
        name: Where it was read from.
        sha256: Of the file.
        weights: SHA-256 of the weights file of the vector that was audited.
        measure: What the verdicts rest on, `restored` or `reach`.
        least_share: The share that a cell is held against.
        stand_in: Whether the fine-tune was stood in for by the aligned model without the vector.
        cells: The cells, the blind spots first.
        prompts: By the key of a prompt, what the safeguarded model's answer was.
        judge: The name of the judge that decided; None where the file does not say.
        max_new_tokens: Tokens after which its answers were cut; None where the file does not say.
        fine_tune: The reference of the fine-tune; None where there was none, or the file does not
            say.
        coefficients: The least, mean and largest of those that were audited; None where the file
            does not say.
    """

    name: str
    sha256: str
    weights: str
    measure: str
    least_share: float
    stand_in: bool
    cells: list[AuditedCell]
    prompts: dict[str, str]
    judge: str | None = None
    max_new_tokens: int | None = None
    fine_tune: dict[str, Any] | None = None
    coefficients: tuple[float, float, float] | None = None

    @property
    def blind_spots(self) -> list[AuditedCell]:
        """The cells in which the vector does too little, or makes it worse."""
        return [cell for cell in self.cells if cell.verdict == "blind_spot"]

    def check_tells(self) -> None:
        """Raises `ConfigError` for an audit that says nothing of any cell: a limit on its blind spots
        would hold nothing.
        """
        if all(cell.verdict in ("too_few", "nothing_lost") for cell in self.cells):
            raise ConfigError(
                f"No cell of the audit {self.name} has enough lost refusals to tell anything, so that no limit on blind spots is held "
                "against: audit with more prompts."
            )

    def check_of(self, weights: str | None, vector: str) -> None:
        """Raises `VectorError` unless it is of a vector's very weights.

        Args:
            weights: SHA-256 of its weights file.
            vector: Its name, for the message.
        """
        if weights is None or self.weights != weights:
            raise VectorError(
                f"The audit {self.name} is of other weights than those of the safety vector {vector}: run `safegene audit` on this vector."
            )


def read_audit(path: str | Path) -> AuditRecord:
    """An audit's file, checked.

    Raises:
        VectorError: It cannot be read, or is damaged or of another version.
    """
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise VectorError(
            f"The audit {path} cannot be read ({getattr(error, 'strerror', None) or error}): name the {AUDIT_FILE} that `safegene audit` wrote."
        ) from error
    return audit_of(data, str(path))


def audit_of(data: bytes, name: str) -> AuditRecord:
    """The audit that the bytes of a file hold.

    Args:
        data: The bytes.
        name: Where they come from, for messages.

    Raises:
        VectorError: They hold none that this version reads.
    """
    try:
        if len(data) > MOST_BYTES:
            raise ValueError("it is larger than any audit")
        found = read_json(data)
        if found["schema_version"] != AUDIT_VERSION:
            raise ValueError("it is of another version")
        cells = [_cell(each) for each in _listed(found["cells"], _MOST_CELLS)]
        record = AuditRecord(
            name,
            sha256_of_bytes(data),
            _matching(_HASH, found["vector"]["weights"]),
            _one_of(MEASURES, found["measure"]),
            _share(found["least_share"]),
            _of(bool, found["fine_tune"]["stand_in"]),
            cells,
            dict(_answers(each) for each in _listed(found["prompts"], MOST_PROMPTS)),
            **_asked(found),
        )
        if len({tuple(sorted(cell.where.items())) for cell in cells}) < len(cells):
            raise ValueError("a cell is there twice")
        if _count(found["blind_spots"]) != len(record.blind_spots):
            raise ValueError("its blind spots are not as many as it says")
        fewest = _count(found.get("min_prompts", 1))
        if not 0 < record.least_share < 1 or not all(
            _can_be(cell, record.least_share, fewest) for cell in cells
        ):
            raise ValueError("a verdict is not that of its numbers")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise VectorError(
            f"{name} is no audit that this version reads ({type(error).__name__}): run `safegene audit` again."
        ) from error
    return record


def _asked(found: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked and judged, and how, as far as the file says."""
    asked: dict[str, Any] = {}
    if "judges" in found:
        asked["judge"] = _of(str, found["judges"][0]["name"])
    if "max_new_tokens" in found:
        asked["max_new_tokens"] = _count(found["max_new_tokens"])
    if "fine_tune" in found.get("models", {}):
        files = found["models"]["fine_tune"]["files"].items()
        asked["fine_tune"] = {"files": {_of(str, key): _of(str, own) for key, own in files}}
    if "coefficients" in found:
        own = found["coefficients"]
        asked["coefficients"] = tuple(_number(own[key]) for key in SUMMARY)
    return asked


def _cell(found: Any) -> AuditedCell:
    where = {_one_of(DIMENSIONS, key): _text(value) for key, value in found["where"].items()}
    if not where:
        raise ValueError("a cell is nowhere")
    share = found["share"]
    return AuditedCell(
        where,
        _one_of(VERDICTS, found["verdict"]),
        _count(found["prompts"]),
        _count(found["count"]),
        None if share is None else _share(share["share"]),
    )


def _can_be(cell: AuditedCell, least_share: float, fewest: int) -> bool:
    """Whether the numbers of a cell allow its verdict, where `fewest` prompts tell something."""
    if cell.count > cell.prompts or (cell.share is None) != (cell.count == 0):
        return False
    if cell.verdict == "nothing_lost":
        return cell.count == 0 and cell.prompts >= max(1, fewest)
    told = cell.verdict in ("blind_spot", "unsure", "fine")
    enough = cell.share is not None and (cell.verdict != "fine" or cell.share > least_share)
    return enough if told else True


def _answers(found: Any) -> tuple[str, str]:
    return _matching(_KEY, found["key"]), _text(found["safeguarded"])


def _listed(value: Any, most: int) -> list[Any]:
    if len(_of(list, value)) > most:
        raise ValueError("it is longer than any audit")
    return list(value)


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"it is no {kind.__name__}")
    return value


def _text(value: Any) -> str:
    text: str = _of(str, value)
    if not text or len(text) > MOST_TEXT:
        raise ValueError("a name is empty or too long")
    return text


def _one_of(names: tuple[str, ...], value: Any) -> str:
    if value not in names:
        raise ValueError("a name is unknown")
    return str(value)


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not pattern.fullmatch(_of(str, value)):
        raise ValueError("a hash is none")
    return str(value)


def _count(value: Any) -> int:
    count: int = _of(int, value)
    if count < 0:
        raise ValueError("a count is negative")
    return count


def _share(value: Any) -> float:
    share = _number(value)
    if not 0 <= share <= 1:
        raise ValueError("a share is none")
    return share


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError("it is no number")
    return float(value)
