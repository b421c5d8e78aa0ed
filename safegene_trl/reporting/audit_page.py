"""An audit as one HTML file that needs nothing else, in the style of the report's page."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ..models.names import layer_ranges
from .html import page_of


PAGE = "audit.html"
AUDIT_SCHEMA: dict[str, Any] = json.loads(
    files(__package__).joinpath("audit.schema.json").read_text(encoding="utf-8")
)
VERDICT_WORDS = {
    "blind_spot": ("blind spot", "bad"),
    "unsure": ("unsure", "fair"),
    "fine": ("fine", "good"),
    "nothing_lost": ("nothing lost", "soft"),
    "too_few": ("too few to tell", "soft"),
}
MEASURE_WORDS = {
    "restored": "Restored",
    "reach": "Reached",
}


def render_audit(audit: Mapping[str, Any]) -> str:
    """The page. Every number of it stands in a `<data value>` with the JSON pointer of where it
    comes from in `data-from`.

    Args:
        audit: As in `audit.json`.
    """
    return page_of(
        "audit.html.jinja",
        words=cell_words,
        audit=audit,
        verdicts=VERDICT_WORDS,
        measure=MEASURE_WORDS[audit["measure"]],
        layers=layer_ranges(audit["attacker"]["layers"]),
    )


def cell_words(where: Mapping[str, str]) -> str:
    """A cell's name: `category privacy, form story`."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in where.items())
