"""`safegene apply`: the safety step on a finished checkpoint or adapter."""

from collections.abc import Sequence
from pathlib import Path

from ..config.settings import SafeGeneConfig
from ..errors import ConfigError
from ..reporting.summary import announcement
from .apply_arguments import ARGUMENTS, ApplyArguments
from .launch_option import launched_processes, wants_launch
from .parsing import make_parser, parse


def main(argv: Sequence[str]) -> int:
    """Writes the safeguarded checkpoint to `safegene.output.output_dir` (default: `<model>-safeguarded`); see `gate.EXIT_CODES`."""
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
            raise ConfigError("`fleet` goes alone: the file names the models, their settings and the processes.")
        from .fleet import run_fleet

        return run_fleet(Path(arguments.fleet))
    name, config = arguments.model_name_or_path, block.config
    if not name:
        raise ConfigError("No model is named: set `model_name_or_path` to a finished checkpoint or adapter.")
    if config is None:
        raise ConfigError("No safety vector is named: add a `safegene` block with `vector` and `data.task_data`.")
    target = Path(config.output.output_dir or f"{Path(name).name}-safeguarded")
    if arguments.coefficients is not None:
        return _merge_stored(config, arguments, target)
    from .apply_loaded import apply_loaded

    return apply_loaded(config, arguments, target)


def _merge_stored(config: SafeGeneConfig, arguments: ApplyArguments, target: Path) -> int:
    from ..step.stored import safeguard_stored

    if launched_processes() > 1:
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
    from ..step.plan import dry_run_message

    print(dry_run_message(target) if config.dry_run else announcement(report, target))
    return 0
