"""`extract`: a safety vector, from what somebody has set to the folder that holds it."""

import logging
from pathlib import Path
from typing import Any

from ..checkpoints.atomic_writes import atomic_directory
from ..checkpoints.contents import VECTOR
from ..config.validation import check_is
from ..distributed.processes import this_job
from ..models.batch_size import naming_shortage
from ..progress import progress_shown
from ..vectors.output import check_vector_output
from ..vectors.safety_vector import SafetyVector
from .by_category import tell
from .config import ExtractionConfig
from .pipeline import make_vector
from .retargeting import retarget
from .transport.transport import make_transported


logger = logging.getLogger(__name__)
_TOO_SMALL = (
    "The extraction ran out of memory: set a smaller `batch_size` or `max_new_tokens`, or share the models out over several "
    "devices by `--accelerate_config zero3`."
)
STABLE = 0.7  # mean Jaccard index below which a selection is called unstable


def extract(config: ExtractionConfig, show_progress: bool = True) -> SafetyVector | None:
    """Makes a family's safety vector of an aligned and a degraded model, and saves it to
    `config.output_dir`.

    For every linear layer `m` of the selected layers `V_m = B_m A_m`: the difference `W_aligned −
    W_degraded` cut to rank r, or what is learned from there (SafeGene, arXiv 2606.06519;
    `linearized` after EnchTable, arXiv 2511.09880). A selection that means little, and a difference
    that lies mostly outside of the linear layers, are warned of. With `config.vector` there is no
    degraded model: that vector's weights are kept and its prompts made anew. Nor is there one with
    `method: transport`, which carries the direction of another model over (arXiv 2606.05290) and
    writes it as `V_m = T(v) uᵀ`. With `config.by_category` the deltas are the sum of a shared
    component and one for every harm category. Collective: every process of a launch calls it.

    Args:
        config: From which models and prompts, how, and where to.
        show_progress: Whether to show progress bars.

    Returns:
        The vector, its factors in `config.weights_dtype`; None in every process but the first.

    Raises:
        ConfigError: A value is missing, impossible, or contradicts another one.
        FamilyError: The two models are not of one family, or only one of them has a chat template;
            or the aligned model is not that of `config.vector`, or has no module that can be split
            by category; or nothing can be carried over from the source model.
        VectorError: `config.vector` is missing, altered or truncated.
        UnsupportedModelError: A model is not to be had, or of a kind that cannot be read.
        CheckpointError: Weight files are missing, damaged, or hold NaN or infinity.
        CalibrationDataError: Prompts are missing or no single user turns, or the aligned model
            refuses none of them; or they have too few categories, or too few prompts of one.
        OutputError: The vector cannot be put where it was asked for.
        MemoryShortageError: The device is too small.
    """
    check_is(config, ExtractionConfig, "extract")
    target, job = Path(config.output_dir), this_job()
    with job.raising_together():
        config.check()
        if job.is_main:
            check_vector_output(target, _inputs(config), config.overwrite_output_dir)
    shown = progress_shown(show_progress and job.is_main)
    with job.naming_rank(), naming_shortage(_TOO_SMALL), shown:
        if config.transports:
            made = make_transported(config, job)
        elif config.vector:
            made = retarget(config, job)
        else:
            made = make_vector(config, job, show_progress)
    with atomic_directory(target, VECTOR, job) as folder, job.raising_together():
        if made is not None:
            made.save_pretrained(folder)
    if made is not None and config.by_category:
        tell(made.extraction["by_category"])
    if made is not None and not config.vector:
        for warning in selection_warnings(made):
            logger.warning(warning)
    return made


def _inputs(config: ExtractionConfig) -> dict[str, Any]:
    """All that is read, by what it is."""
    return {
        "the aligned model": config.aligned_model,
        "the degraded model": [config.degraded_model, config.source_degraded_model],
        "the source model": config.source_model,
        "the safety vector": [config.vector, config.source_vector],
        "the harmful data": config.harmful_data,
        "the benign data": config.benign_data,
        "the anchors": config.anchor_data,
        "the audit": config.cover,
        "the test data": [
            source
            for source in (config.test_harmful_data, config.test_benign_data)
            if source is not None
        ],
        "the task model": config.isolate_from,
    }


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
