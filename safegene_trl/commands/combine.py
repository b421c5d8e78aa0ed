"""`safegene combine VECTOR VECTOR …`: several safety vectors as the components of one."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..combination import combined
from ..output import atomic_directory, check_output
from ..vector import SafetyVector
from ..vector_files import CONFIG_FILE


def main(argv: Sequence[str]) -> int:
    """Saves the vector to `--output_dir`."""
    parser = argparse.ArgumentParser(prog="safegene combine", description="Make one safety vector of several.")
    parser.add_argument("vectors", nargs="+", help="Two or more safety vectors of one aligned model.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the vector goes.")
    arguments = parser.parse_args(list(argv))
    check_output(arguments.output_dir, marker=CONFIG_FILE)
    vector = combined([SafetyVector.from_pretrained(name) for name in arguments.vectors])
    with atomic_directory(arguments.output_dir, marker=CONFIG_FILE) as folder:
        vector.save_pretrained(folder)
    ranks = " + ".join(map(str, vector.components))
    print(f"Safety vector of {len(vector.components)} components (rank {ranks}): {arguments.output_dir}")
    return 0
