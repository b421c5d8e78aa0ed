"""What `safegene apply` takes where the coefficients are given."""

import subprocess
import sys
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..checkpoints.checkpoint_folder import CheckpointFolder
from ..checkpoints.merge_terms import ScaledVector
from ..checkpoints.stored_merge import write_merged
from ..config.settings import SafeGeneConfig
from ..errors import UnexpectedError
from ..models.data_types import WrittenTypes
from ..vectors.safety_vector import SafetyVector
from .cost import Cost
from .probe import Probe, temporary_folder_beside


def estimate_stored_merge(
    probe: Probe, config: SafeGeneConfig, vector: SafetyVector, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Cost]:
    """Cost of `save` where the coefficients are given and the weights are merged from file to file."""
    deltas = probe.deltas(vector.deltas, vector.rank)
    with temporary_folder_beside(config.output.output_dir) as place:
        stored = probe.stored(place)

        def write(index: int, folder: Path) -> None:
            own = deltas[index]
            added = ScaledVector(own, dict.fromkeys(own, 0.1))
            checkpoint = CheckpointFolder(folder, tokenizer, config.output.max_shard_size)
            stored[index].types = WrittenTypes.of_model(stored[index].model, config.output.dtype)
            write_merged(stored[index], added, checkpoint, show_progress=False)

        seconds, memory, disk = probe.measure_writing(write, config.output.output_dir, on_host=True)
    return {"save": Cost(seconds, _bytes_of_merging_process() + memory, disk)}


@cache
def _bytes_of_merging_process() -> int:
    """Resident bytes of a process that has imported what a merge from files works with.

    The estimate itself imports more, so it does not ask for its own.
    """
    program = (
        "import psutil, safegene_trl.step.stored_fine_tune; "
        "print(psutil.Process().memory_info().rss)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise UnexpectedError(
            "A process that only imports this package took more than two minutes, so that its memory is not known: run the estimate "
            "again when the machine is less busy."
        ) from error
    return int(done.stdout)
