"""`safegene apply`: the safety step on a finished checkpoint or adapter."""

from collections.abc import Sequence
from pathlib import Path

from ..config.settings import SafeGeneConfig
from ..distributed.world_size import launched_processes
from ..errors import ConfigError, RejectedError
from ..reporting.summary import announcement
from ..step.apply import NO_MODEL, apply, output_of
from .apply_arguments import ARGUMENTS, ApplyArguments
from .launch_option import wants_launch
from .output import give
from .parsing import make_parser, parse


def main(argv: Sequence[str]) -> int:
    """Writes the safeguarded checkpoint to `safegene.output.output_dir` (default:
    `<model>-safeguarded`); see `gate.EXIT_CODES`.
    """
    if wants_launch(argv):
        from .launching import launch

        return launch("apply", argv, make_parser(ARGUMENTS))
    arguments, block = parse(
        ARGUMENTS,
        argv,
        prog="safegene apply",
        description="Recalibrate and merge a safety vector into a finished checkpoint or adapter.",
    )
    if arguments.fleet is not None:
        if arguments.model_name_or_path or block.safegene is not None or launched_processes() > 1:
            raise ConfigError(
                "`fleet` goes alone: the file names the models, their settings and the processes."
            )
        from .fleet import run_fleet

        return run_fleet(Path(arguments.fleet))
    name, config = arguments.model_name_or_path, block.config
    if not name:
        raise ConfigError(NO_MODEL)
    if config is None:
        raise ConfigError(
            "No safety vector is named: add a `safegene` block with `vector` and `data.task_data`."
        )
    if arguments.coefficients is not None:
        return _applied(config, arguments)
    from ..distributed.processes import join_processes, leave_processes, this_job

    join_processes()
    try:
        code = _applied(config, arguments, this_job().is_main)
    except RejectedError:  # on every rank
        leave_processes()
        raise
    leave_processes()
    return code


def _applied(config: SafeGeneConfig, arguments: ApplyArguments, is_main: bool = True) -> int:
    """Safeguards the model; the first process says what came of it."""
    name = arguments.model_name_or_path
    report = apply(
        config,
        name,
        model_revision=arguments.model_revision,
        dtype=arguments.dtype,
        coefficients=arguments.coefficients,
        base_model=arguments.base_model,
        allow_pickled_shards=arguments.allow_pickled_shards,
    )
    from ..step.decision import EXIT_CODES
    from ..step.plan import dry_run_message

    target = output_of(config, name)
    if is_main:
        give(report, dry_run_message(target) if config.dry_run else announcement(report, target))
    return 0 if config.dry_run else EXIT_CODES[report["decision"]["outcome"]]
