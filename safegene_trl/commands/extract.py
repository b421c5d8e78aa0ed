"""`safegene extract`: a safety vector from an aligned and a degraded model."""

from collections.abc import Sequence

from ..distributed.processes import join_processes, leave_processes
from ..extraction.config import ExtractionConfig
from ..extraction.extract import extract
from .launch_option import wants_launch
from .launching import launch
from .parsing import make_parser, parse


def main(argv: Sequence[str]) -> int:
    """Makes the vector and saves it to `output_dir`."""
    if wants_launch(argv):
        return launch("extract", argv, make_parser((ExtractionConfig,)))
    join_processes()
    (config,) = parse(
        (ExtractionConfig,), argv, prog="safegene extract", description="Make a safety vector."
    )
    vector = extract(config)
    if vector is not None:
        share = vector.extraction["covered_share"]
        print(f"The linear layers hold {100 * share:.3g} % of the difference of the two models.")
        print(
            f"Safety vector (rank {vector.rank}, layers {vector.layer_ranges}): {config.output_dir}"
        )
    leave_processes()
    return 0
