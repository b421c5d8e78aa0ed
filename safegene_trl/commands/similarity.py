"""`safegene similarity VECTOR VECTOR …`: pairwise cosines of a family's safety vectors, or of the
components of one.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.preflight import check_outputs
from ..config.validation import written_path
from ..reporting.plots import component_maps, heat_map
from ..text import printable
from ..vectors.components import category_cosines, component_cosines
from ..vectors.safety_vector import SafetyVector
from ..vectors.similarity import cosine_table
from .output import give, json_file
from .plain_parser import PlainParser


def main(argv: Sequence[str]) -> int:
    """Prints the table, of one vector that of its components; with `--plot` also a PNG."""
    parser = PlainParser(
        prog="safegene similarity", description="Compare safety vectors of one family."
    )
    parser.add_argument(
        "vectors",
        nargs="+",
        help="Two or more safety vectors (directories or hub ids), or one of several components.",
    )
    parser.add_argument("--plot", type=written_path, help="PNG file for a heat map.")
    arguments = parser.read(argv)
    check_outputs([arguments.plot, json_file()])
    vectors = [SafetyVector.from_pretrained(name) for name in arguments.vectors]
    if len(vectors) == 1:
        if len(vectors[0].components) < 2:
            parser.error("name two or more vectors, or one of several components")
        found, text = _components(vectors[0], arguments.plot)
    else:
        found, text = _pairs(vectors, arguments)
    give({"vectors": arguments.vectors, **found}, text)
    return 0


def _pairs(vectors: Sequence[SafetyVector], arguments: Any) -> tuple[dict[str, Any], str]:
    """Compares vectors with each other; the numbers, and a table."""
    tables = cosine_table(vectors)
    labels = list(map(printable, short_names(arguments.vectors)))
    if arguments.plot:
        heat_map(tables, labels, arguments.plot)
    return {"cosines": tables}, _text(tables, labels)


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each name, and as many before it as tell it from the others; what is named
    twice gets its number.
    """
    parts = [Path(os.path.abspath(name) if Path(name).is_dir() else name).parts for name in names]
    found = []
    for number, own in enumerate(parts, start=1):
        others = [other for place, other in enumerate(parts, start=1) if place != number]
        lengths = range(1, len(own) + 1)
        told = [n for n in lengths if all(other[-n:] != own[-n:] for other in others)]
        label = "/".join(own[-told[0] :] if told else own[-1:])
        found.append(label if told else f"{label} ({number})")
    return found


def _components(vector: SafetyVector, plot: Path | None) -> tuple[dict[str, Any], str]:
    """Compares the components of a vector, of one by category also what these write; the numbers,
    and a table of each.
    """
    names = vector.component_names
    tables = component_cosines(vector.deltas, vector.components)
    found: dict[str, Any] = {"components": names, "cosines": tables}
    panels = {"weights": (tables["overall"], names)}
    if "by_category" in vector.extraction:
        found["written"] = category_cosines(vector.deltas, len(names) - 1)
        panels["what categories write"] = found["written"], names[1:]
    text = [
        f"{title}\n{_square(table, list(map(printable, labels)))}"
        for title, (table, labels) in panels.items()
    ]
    if plot:
        component_maps(panels, plot)
    return found, "\n".join(text)


def _square(table: Sequence[Sequence[float | None]], labels: Sequence[str]) -> str:
    """The cosines of all components with each other; columns have the rows' numbers."""
    numbered = [f"{number} {label}" for number, label in enumerate(labels, start=1)]
    width = max(map(len, numbered))
    heads = "".join(f"{number:>8}" for number in range(1, len(labels) + 1))
    rows = [
        f"{name:<{width}}" + "".join(f"{_cell(value):>8}" for value in row)
        for name, row in zip(numbered, table, strict=True)
    ]
    return "\n".join([" " * width + heads, *rows])


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _text(tables: dict[str, list[list[float | None]]], labels: Sequence[str]) -> str:
    pairs = [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]
    heads = [f"{labels[i]} · {labels[j]}" for i, j in pairs]
    lines = [f"{'':<10}" + "".join(f"{head:>{len(head) + 3}}" for head in heads)]
    for name, table in tables.items():
        cells = [_cell(table[i][j]) for i, j in pairs]
        lines.append(
            f"{name:<10}" + "".join(f"{c:>{len(h) + 3}}" for c, h in zip(cells, heads, strict=True))
        )
    return "\n".join(lines)
