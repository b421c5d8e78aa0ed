"""Prompts for the cells that an audit found a vector to restore too little in, so that recalibration
has shots there.

A blind spot is a category, a language, a form or a length, or several of them crossed. What covers
it are prompts of that kind, put into that form. The aligned model is asked them as any other
prompt, and what it refuses goes into the vector with its refusal.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.forms import Place, check_form, length_of, plain, put
from ..data.prompt_languages import known_languages, language_of
from ..data.prompts import in_turn, near_duplicates
from ..errors import CalibrationDataError, ConfigError
from ..text import printable
from ..vectors.audit_file import AuditedCell, AuditRecord, read_audit
from .config import ExtractionConfig


logger = logging.getLogger(__name__)
_SHOWN = 3  # cells in a message


@dataclass(frozen=True)
class Cover:
    """What covers an audit's blind spots.

    Attributes:
        prompts: The prompts, each in its form; each once.
        categories: Of those that have one.
        record: What a vector says of them.
    """

    prompts: list[str] = field(default_factory=list)
    categories: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def read_cover(
    config: ExtractionConfig,
    texts: Sequence[str],
    categories: Mapping[str, str],
    stored: Sequence[str],
    measured: Sequence[str],
) -> Cover:
    """The prompts that cover the blind spots of the audit `config.cover`.

    Args:
        config: It names the audit, how many prompts are wanted, and where they are from.
        texts: The harmful prompts that there are.
        categories: Of those that have one.
        stored: Prompts that a vector has already.
        measured: Prompts that it measures on: none that nearly repeats one is taken.

    Raises:
        VectorError: The audit cannot be read, or is damaged.
        ConfigError: It has no blind spot that prompts of one turn can cover.
        CalibrationDataError: No prompt is of any of its blind spots.
    """
    audit = read_audit(config.cover)
    cells = _coverable(audit)
    near = near_duplicates(list(texts), [plain(text) for text in measured])
    left = [text for i, text in enumerate(texts) if i not in near]
    known = known_languages(config.harmful_data, config.data_split)
    found: dict[str, tuple[str, list[str]]] = {}
    taken = set(stored)
    for cell, text, own in _of_cells(cells, left, categories, known):
        if own not in taken:
            found.setdefault(own, (text, []))[1].append(cell.name)
    there = Counter(name for _, names in found.values() for name in names)
    # of the cells that a prompt lies in it stands for the one that has the fewest
    chosen = in_turn(
        list(found),
        config.num_cover_prompts,
        config.seed,
        lambda own: min(found[own][1], key=lambda name: there[name]),
    )
    if not chosen:
        raise CalibrationDataError(
            f"{config.harmful_data} has no prompt for a blind spot of {config.cover} ({_named(cells)}) that the vector does not have: "
            "name a data set with prompts of these categories, languages and lengths as `harmful_data`."
        )
    covered = Counter(name for own in chosen for name in found[own][1])
    counts = {cell.name: covered[cell.name] for cell in cells}
    if bare := [cell for cell in cells if not counts[cell.name]]:
        logger.warning("No prompt covers these blind spots: %s.", _named(bare))
    return Cover(
        chosen,
        {own: categories[text] for own in chosen if (text := found[own][0]) in categories},
        {"audit": audit.sha256, "prompts": counts},
    )


def check_cover(config: ExtractionConfig, weights: str | None) -> None:
    """Raises `VectorError` where an audit that is to be covered is of another vector's weights.

    Args:
        config: It may name an audit.
        weights: SHA-256 of the weights file of the vector whose prompts are made anew.
    """
    if config.cover:
        read_audit(config.cover).check_of(weights, config.vector)


def _coverable(audit: AuditRecord) -> list[AuditedCell]:
    spots = audit.blind_spots
    for cell in spots:
        if "form" in cell.where:
            check_form(cell.where["form"], audit.name)
    if not spots:
        raise ConfigError(f"{audit.name} has no blind spot: there is nothing to cover.")
    # a vector's prompts are single turns of the user
    found = [cell for cell in spots if cell.where.get("form") != "many_turn"]
    if not found:
        raise ConfigError(
            f"The blind spots of {audit.name} are conversations of many turns, and a vector's prompts are single turns: there is nothing "
            "that could cover them."
        )
    if len(found) < len(spots):
        logger.warning(
            "A vector's prompts are single turns: the blind spots in conversations of many turns are not covered."
        )
    return found


def _of_cells(
    cells: Sequence[AuditedCell],
    texts: Sequence[str],
    categories: Mapping[str, str],
    known: Mapping[str, str],
) -> Iterator[tuple[AuditedCell, str, str]]:
    """Every cell with each of its prompts, as it is and in the cell's form."""
    for text in texts:
        place = Place(categories.get(text), language_of(text, known), length=length_of(text))
        for cell in cells:
            wanted = {key: value for key, value in cell.where.items() if key != "form"}
            if place.within(Place(**wanted)):
                form = cell.where.get("form", "direct")
                yield cell, text, put(text, form)[-1]["content"]


def _named(cells: Sequence[AuditedCell]) -> str:
    more = len(cells) - _SHOWN
    named = "; ".join(printable(cell.name) for cell in cells[:_SHOWN])
    return named + (f" and {more} more" if more > 0 else "")
