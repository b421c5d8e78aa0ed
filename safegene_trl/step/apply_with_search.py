"""The safety step on a finished model that is loaded for it: coefficients are searched for, and
what comes of them is measured.
"""

from pathlib import Path
from typing import Any

from ..checkpoints.loading import load_placed, load_processor
from ..checkpoints.source import adapter_base, further_adapters
from ..config.settings import SafeGeneConfig
from ..data.sources import check_there
from ..distributed.processes import this_job
from .lineage import check_not_safeguarded
from .live_fine_tune import safeguard
from .plan import FINE_TUNE, InputModel, Origin, load_vector
from .preparation import prepare


def safeguard_loaded(
    config: SafeGeneConfig,
    name_or_path: str,
    revision: str | None,
    target: Path,
    dtype: str = "auto",
    allow_pickled_shards: bool = False,
) -> dict[str, Any]:
    """Recalibrates and merges the vector into a finished checkpoint or adapter; returns the report.
    Collective.

    Args:
        config: What to do.
        name_or_path: Directory or hub id of the checkpoint or adapter.
        revision: Its branch, tag or commit on the hub.
        target: Folder of the checkpoint to be.
        dtype: Data type to load it in, and to save it in unless the config names another.
        allow_pickled_shards: Read DeepSpeed's shards, which are pickle files.

    Raises:
        SafeGeneError: One of its kinds.
    """
    job = this_job()
    with job.raising_together():
        for source in _data_sources(config):  # before a large model is loaded
            check_there(source)
        check_not_safeguarded(name_or_path, revision)
        load_vector(config)
        processor, base = (
            load_processor(name_or_path, revision),
            adapter_base(name_or_path, revision),
        )
    model, sharding = load_placed(name_or_path, revision, dtype, job, allow_pickled_shards)
    with sharding.naming_rank():
        origin = Origin(base, None, "full" if base is None else "lora", {FINE_TUNE: name_or_path})
        prepared = prepare(config, InputModel(model, processor, origin), target, sharding)
        prepared.plan.report.warnings += further_adapters(name_or_path)
        prepared.plan.warn()
        if config.dry_run:
            return prepared.plan.report.to_dict()
        return safeguard(prepared, model, adapter_base=base or name_or_path)


def _data_sources(config: SafeGeneConfig) -> list[str]:
    """The data sets that the step will read."""
    data, gate = config.data, config.gate
    named = [data.task_data, data.safety_data]
    named += [gate.harmful_data, gate.benign_data] if gate is not None else []
    return [source for source in named if source is not None]
