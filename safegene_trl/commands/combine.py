"""`safegene combine VECTOR VECTOR …`: several safety vectors as the components of one."""

import argparse
from collections.abc import Sequence

from ..checkpoints.output import VECTOR, atomic_directory
from ..config.validation import written_path
from ..vectors.combination import combined
from ..vectors.safety_vector import SafetyVector
from .vector_output import check_vector_output


def main(argv: Sequence[str]) -> int:
    """Saves the vector to `--output_dir`."""
    parser = argparse.ArgumentParser(prog="safegene combine", description="Make one safety vector of several.")
    parser.add_argument("vectors", nargs="+", help="Two or more safety vectors of one aligned model.")
    parser.add_argument("--output_dir", type=written_path, required=True, help="Where the vector goes.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace a vector that is there.")
    arguments = parser.parse_args(list(argv))
    check_vector_output(arguments.output_dir, {"the vector": arguments.vectors}, arguments.overwrite_output_dir)
    vector = combined([SafetyVector.from_pretrained(name) for name in arguments.vectors])
    with atomic_directory(arguments.output_dir, kind=VECTOR) as folder:
        vector.save_pretrained(folder)
    ranks = " + ".join(map(str, vector.components))
    print(f"Safety vector of {len(vector.components)} components (rank {ranks}): {arguments.output_dir}")
    return 0
