"""`safegene extract`: a safety vector from an aligned and a degraded model."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.output import VECTOR, atomic_directory
from ..distributed.processes import join_processes, leave_processes, this_job
from ..extraction.config import ExtractionConfig
from ..extraction.pipeline import extract
from ..vectors.safety_vector import SafetyVector
from .launch_option import wants_launch
from .launching import launch
from .parsing import make_parser, parse
from .vector_output import check_vector_output


logger = logging.getLogger(__name__)
STABLE = 0.7  # mean Jaccard index below which a selection is called unstable


def main(argv: Sequence[str]) -> int:
    """Makes the vector and saves it to `output_dir`."""
    if wants_launch(argv):
        return launch("extract", argv, make_parser((ExtractionConfig,)))
    join_processes()
    (config,) = parse((ExtractionConfig,), argv, prog="safegene extract", description="Make a safety vector.")
    target, job = Path(config.output_dir), this_job()
    with job.agreed():
        config.check()
        if job.is_main:
            inputs = {"the aligned model": config.aligned_model, "the degraded model": config.degraded_model}
            inputs |= {"the harmful data": config.harmful_data, "the benign data": config.benign_data}
            inputs |= {"the task model": config.isolate_from}
            check_vector_output(target, inputs, config.overwrite_output_dir)
    with job.named():
        vector = extract(config, job)
    with atomic_directory(target, VECTOR, job) as folder, job.agreed():
        if vector is not None:
            vector.save_pretrained(folder)
    if vector is not None:
        for warning in selection_warnings(vector):
            logger.warning(warning)
        share = vector.extraction["covered_share"]
        print(f"The linear layers hold {100 * share:.3g} % of the difference of the two models.")
        print(f"Safety vector (rank {vector.rank}, layers {vector.layer_ranges}): {config.output_dir}")
    leave_processes()
    return 0


def selection_warnings(vector: SafetyVector) -> list[str]:
    """What is to be said about a selection that means little or depends on chance."""
    selection, warnings = vector.selection, []
    if selection["layer_share"] == 1:
        return []
    if (
        selection["method"] == "activation_contrast"
        and sum(selection["scores"][layer] for layer in vector.layers) <= 0
    ):
        warnings.append(
            "No layer reacts more to harmful than to benign prompts, so this selection means little: set `layer_share: 1.0`, "
            "or degrade with data that leaves benign answers alone."
        )
    jaccard = selection["stability"]["mean_jaccard"]
    if jaccard < STABLE:
        warnings.append(
            f"The selected layers depend on the prompts (mean Jaccard index {jaccard:.2f} over resampled prompts): give more "
            "prompts, or set `layer_share: 1.0`."
        )
    return warnings
