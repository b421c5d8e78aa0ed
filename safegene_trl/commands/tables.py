"""Text tables."""

from collections.abc import Sequence

from ..text import printable


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the heading among them, in columns; what a cell holds is `printable`."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
