"""`safegene apply` on a model that is loaded: coefficients are searched for, and what comes of them is measured."""

from pathlib import Path

from ..checkpoints.loading import load_placed, load_processor
from ..checkpoints.source import adapter_base
from ..config.settings import SafeGeneConfig
from ..distributed.processes import join_processes, leave_processes, this_job
from ..errors import ConfigError, RejectedError
from ..reporting.summary import announcement
from ..step.gate import EXIT_CODES
from ..step.lineage import check_not_safeguarded
from ..step.live import prepare, safeguard
from ..step.plan import FINE_TUNE, Origin, dry_run_message
from .apply_arguments import ApplyArguments


def apply_loaded(config: SafeGeneConfig, arguments: ApplyArguments, target: Path) -> int:
    """Writes the safeguarded checkpoint to `target`; see `gate.EXIT_CODES`."""
    if config.data.task_data is None:
        raise ConfigError(
            "`data.task_data` is not set: name the data the model was fine-tuned on, to measure utility."
        )
    join_processes()
    name, revision, job, code = arguments.model_name_or_path, arguments.model_revision, this_job(), 0
    with job.agreed():
        check_not_safeguarded(name, revision)
        processor, base = load_processor(name, revision), adapter_base(name, revision)
    model, sharding = load_placed(name, revision, arguments.dtype, job, arguments.allow_pickled_shards)
    with sharding.named():
        origin = Origin(base, None, "full" if base is None else "lora", {FINE_TUNE: name})
        plan = prepare(config, model, processor, target, sharding, origin)
        if config.dry_run:
            message = dry_run_message(target)
        else:
            try:
                report = safeguard(plan, model, adapter_base=base or name)
            except RejectedError:  # on every rank
                leave_processes()
                raise
            message, code = announcement(report, target), EXIT_CODES[report["decision"]["outcome"]]
    if sharding.is_main:
        print(message)
    leave_processes()
    return code
