"""`safegene combine VECTOR VECTOR …`: several safety vectors as the components of one."""

from collections.abc import Sequence

from ..config.validation import written_path
from ..vectors.combination import combine
from .output import give
from .plain_parser import PlainParser
from .vector_record import record_of


def main(argv: Sequence[str]) -> int:
    """Saves the vector to `--output_dir`."""
    parser = PlainParser(prog="safegene combine", description="Make one safety vector of several.")
    parser.add_argument(
        "vectors", nargs="+", help="Two or more safety vectors of one aligned model."
    )
    parser.add_argument(
        "--output_dir", type=written_path, required=True, help="Where the vector goes."
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace a vector that is there."
    )
    arguments = parser.read(argv)
    vector = combine(arguments.vectors, arguments.output_dir, arguments.overwrite_output_dir)
    ranks = " + ".join(map(str, vector.components))
    give(
        record_of(vector, str(arguments.output_dir)),
        f"Safety vector of {len(vector.components)} components (rank {ranks}): {arguments.output_dir}",
    )
    return 0
