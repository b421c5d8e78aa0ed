"""What was measured, as the cells of a table: in a terminal and on a page."""

from collections.abc import Mapping
from typing import Any

from ..config.metrics import METRICS


def headings() -> list[str]:
    """Over what `measured_cells` gives."""
    return [metric.heading for metric in METRICS.values()]


def measured_cells(measured: Mapping[str, Any]) -> list[str]:
    """Under `headings`: shares before → after the safety step, where they were measured."""
    cells = []
    for metric in METRICS.values():
        before, after = (metric.measured(measured, side) for side in ("before", "after"))
        if metric.difference:
            form = "+.1%" if metric.signed else ".0%"
            cells.append(_percent(after["share"], form) if after else "")
        else:
            cells.append(
                f"{_percent(before['share'])} → {_percent(after['share'])}"
                if before and after
                else ""
            )
    return cells


def _percent(share: float | None, form: str = ".0%") -> str:
    """A share; a dash for null, which stands in reports for a number that is not finite."""
    return "–" if share is None else format(share, form)
