"""`safegene similarity VECTOR VECTOR …`: pairwise cosines of a family's safety vectors."""

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.atomic_writes import replace_file
from ..checkpoints.preflight import check_writable
from ..config.validation import written_path
from ..reporting.plots import heat_map
from ..text import printable, strict_json
from ..vectors.safety_vector import SafetyVector
from ..vectors.similarity import cosine_table
from .plain_parser import PlainParser


def main(argv: Sequence[str]) -> int:
    """Prints the table; with `--plot` also a PNG, with `--json` all numbers to a file."""
    parser = PlainParser(
        prog="safegene similarity", description="Compare safety vectors of one family."
    )
    parser.add_argument(
        "vectors", nargs="+", help="Two or more safety vectors: directories or hub ids."
    )
    parser.add_argument("--plot", type=written_path, help="PNG file for a heat map.")
    parser.add_argument("--json", type=written_path, help="JSON file for the table.")
    arguments = parser.read(argv)
    if len(arguments.vectors) < 2:
        parser.error("name two or more vectors")
    for path in filter(None, (arguments.json, arguments.plot)):
        check_writable(path)
    tables = cosine_table([SafetyVector.from_pretrained(name) for name in arguments.vectors])
    labels = [printable(Path(name).name) for name in arguments.vectors]
    print(_text(tables, labels))
    if arguments.json:
        record = {"vectors": arguments.vectors, "cosines": tables}
        replace_file(arguments.json, strict_json(record) + "\n")
    if arguments.plot:
        heat_map(tables, labels, arguments.plot)
    return 0


def _text(tables: dict[str, list[list[float | None]]], labels: Sequence[str]) -> str:
    pairs = [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]
    heads = [f"{labels[i]} · {labels[j]}" for i, j in pairs]
    lines = [f"{'':<10}" + "".join(f"{head:>{len(head) + 3}}" for head in heads)]
    for name, table in tables.items():
        cells = ["–" if table[i][j] is None else f"{table[i][j]:.3f}" for i, j in pairs]
        lines.append(
            f"{name:<10}" + "".join(f"{c:>{len(h) + 3}}" for c, h in zip(cells, heads, strict=True))
        )
    return "\n".join(lines)
