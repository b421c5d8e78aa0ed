"""`safegene apply`: the safety step on a finished checkpoint or adapter."""

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.loading import adapter_base, load_placed, load_tokenizer
from ..config.settings import SafeGeneConfig
from ..distributed.processes import join_processes, leave_processes, this_job
from ..errors import ConfigError, RejectedError
from ..reporting.summary import announcement
from ..step.gate import EXIT_CODES
from ..step.lineage import check_not_safeguarded
from ..step.live import prepare, safeguard
from ..step.plan import FINE_TUNE, Origin, dry_run_message
from ..step.stored import safeguard_stored
from .apply_arguments import ARGUMENTS, ApplyArguments
from .fleet import run_fleet
from .launching import launch, wants_launch
from .parsing import make_parser, parse


def main(argv: Sequence[str]) -> int:
    """Writes the safeguarded checkpoint to `safegene.output_dir` (default: `<model>-safeguarded`); see `gate.EXIT_CODES`."""
    if wants_launch(argv):
        return launch("apply", argv, make_parser(ARGUMENTS))
    join_processes()
    arguments, block = parse(
        ARGUMENTS,
        argv,
        prog="safegene apply",
        description="Recalibrate and merge a safety vector into a finished checkpoint or adapter.",
    )
    if arguments.fleet is not None:
        if arguments.model_name_or_path or block.safegene is not None or this_job().world_size > 1:
            raise ConfigError("`fleet` goes alone: the file names the models, their settings and the processes.")
        return run_fleet(Path(arguments.fleet))
    name, config = arguments.model_name_or_path, block.config
    if not name:
        raise ConfigError("No model is named: set `model_name_or_path` to a finished checkpoint or adapter.")
    if config is None:
        raise ConfigError("No safety vector is named: add a `safegene` block with `vector` and `task_data`.")
    target = Path(config.output_dir or f"{Path(name).name}-safeguarded")
    if arguments.coefficients is not None:
        return _merge_stored(config, arguments, target)
    if config.task_data is None:
        raise ConfigError("`task_data` is not set: name the data the model was fine-tuned on, to measure utility.")
    revision, job, code = arguments.model_revision, this_job(), 0
    with job.agreed():
        check_not_safeguarded(name, revision)
        tokenizer, base = load_tokenizer(name, revision), adapter_base(name, revision)
    model, sharding = load_placed(name, revision, arguments.dtype, job, arguments.allow_pickled_shards)
    with sharding.named():
        origin = Origin(base, None, "full" if base is None else "lora", {FINE_TUNE: name})
        plan = prepare(config, model, tokenizer, target, sharding, origin)
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


def _merge_stored(config: SafeGeneConfig, arguments: ApplyArguments, target: Path) -> int:
    if this_job().world_size > 1:
        raise ConfigError("`coefficients` are merged from file to file by one process: leave out the launcher.")
    if arguments.dtype != "auto":
        raise ConfigError("With `coefficients` the checkpoint keeps its own data type: leave out `dtype`.")
    report = safeguard_stored(
        config,
        arguments.model_name_or_path,
        arguments.model_revision,
        str(arguments.coefficients),
        target,
        arguments.base_model,
    )
    print(dry_run_message(target) if config.dry_run else announcement(report, target))
    return 0
