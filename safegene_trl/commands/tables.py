"""Text tables."""

from collections.abc import Mapping, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the heading among them, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows)


HEADINGS = ("refuses harmful", "refuses benign", "incoherent", "utility lost")


def measured_cells(measured: Mapping[str, Any]) -> list[str]:
    """Under `HEADINGS`: shares before → after the safety step, where they were measured."""
    cells = []
    for name in ("refusal_rate", "over_refusal", "incoherent"):
        before, after = ((measured.get(side) or {}).get(name) for side in ("before", "after"))
        cells.append(f"{before['share']:.0%} → {after['share']:.0%}" if before and after else "")
    loss = measured.get("utility_loss")
    return [*cells, f"{loss['share']:+.1%}" if loss else ""]
