"""`safegene similarity VECTOR VECTOR …`: pairwise cosines of a family's safety vectors, or of the
components of one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.atomic_writes import replace_file
from ..checkpoints.preflight import check_writable
from ..config.validation import written_path
from ..reporting.plots import heat_map
from ..text import printable, strict_json
from ..vectors.components import component_cosines
from ..vectors.safety_vector import SafetyVector
from ..vectors.similarity import cosine_table
from .plain_parser import PlainParser


def main(argv: Sequence[str]) -> int:
    """Prints the table, of one vector that of its components; with `--plot` also a PNG, with `--json` all numbers to a file."""
    parser = PlainParser(
        prog="safegene similarity", description="Compare safety vectors of one family."
    )
    parser.add_argument(
        "vectors",
        nargs="+",
        help="Two or more safety vectors (directories or hub ids), or one of several components.",
    )
    parser.add_argument("--plot", type=written_path, help="PNG file for a heat map.")
    parser.add_argument("--json", type=written_path, help="JSON file for the table.")
    arguments = parser.read(argv)
    for path in filter(None, (arguments.json, arguments.plot)):
        check_writable(path)
    vectors = [SafetyVector.from_pretrained(name) for name in arguments.vectors]
    record: dict[str, Any] = {"vectors": arguments.vectors}
    if len(vectors) == 1:
        (vector,) = vectors
        labels = [printable(name) for name in vector.component_names]
        if len(labels) < 2:
            parser.error("name two or more vectors, or one of several components")
        tables = component_cosines(vector.deltas, vector.components)
        print(_square(tables["overall"], labels))
        record["components"] = vector.component_names
    else:
        tables = cosine_table(vectors)
        labels = [printable(Path(name).name) for name in arguments.vectors]
        print(_text(tables, labels))
    if arguments.json:
        record["cosines"] = tables
        replace_file(arguments.json, strict_json(record) + "\n")
    if arguments.plot:
        heat_map(tables, labels, arguments.plot)
    return 0


def _square(table: Sequence[Sequence[float | None]], labels: Sequence[str]) -> str:
    """The cosines of all components with each other; columns have the rows' numbers."""
    numbered = [f"{number} {label}" for number, label in enumerate(labels)]
    width = max(map(len, numbered))
    heads = "".join(f"{number:>8}" for number in range(len(labels)))
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
