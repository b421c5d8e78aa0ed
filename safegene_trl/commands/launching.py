"""`--accelerate_config`: starting a command in many processes by `accelerate launch`, as TRL's own
commands do.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from subprocess import CalledProcessError
from typing import Any, cast

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .launch_option import take_config
from .output import passed_on
from .plain_parser import refuse
from .yaml_files import read_yaml


def launch(command: str, argv: Sequence[str], own: ArgumentParser) -> int:
    """Runs `safegene COMMAND` under `accelerate launch`; returns the exit code.

    Args:
        command: The subcommand.
        argv: Its arguments, `--accelerate_config NAME_OR_PATH` among them. Options that the
            subcommand does not know and `accelerate launch` does, e.g. `--num_processes` or
            `--machine_rank`, go to the launcher.
        own: The subcommand's parser.

    Raises:
        ConfigError: There is no such file or shipped name.
    """
    parser = launch_command_parser()
    cast(Any, parser).error = refuse  # accelerate's own prints its usage
    path, rest = take_config(argv)
    launcher_options = set(parser._option_string_actions) - set(own._option_string_actions)
    to_launcher, to_command = _split(rest, launcher_options)
    with passed_on() as output:
        words = ["-m", "safegene_trl", command, *to_command, *output]
        settings = parser.parse_args(["--config_file", str(path), *to_launcher, *words])
        _fill_in(settings, read_yaml(path, "The launch configuration"))
        return _launched(settings)


def _launched(settings: Namespace) -> int:
    """The exit code of the processes."""
    try:
        launch_command(settings)
    except ChildFailedError as failure:  # the failing process has said why
        _, first = failure.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 1
    except CalledProcessError as failure:  # a launcher of one process
        return failure.returncode if failure.returncode > 0 else 1
    return 0


def _fill_in(settings: Namespace, config: Mapping[str, Any]) -> None:
    """Sets what neither the words nor the file say: as many processes as GPUs, and on one machine a
    free port, where accelerate would take 29500 for every launch, and a second one at a time fail.
    """

    def is_open(name: str) -> bool:
        return getattr(settings, name) is None and config.get(name) is None

    if is_open("num_processes"):
        settings.num_processes = max(1, torch.cuda.device_count())
    machines = settings.num_machines or config.get("num_machines") or 1
    if machines == 1 and is_open("main_process_port"):
        settings.main_process_port = 0


def _split(argv: Sequence[str], launcher_options: set[str]) -> tuple[list[str], list[str]]:
    """Arguments for the launcher and for the command; a value goes where its option goes."""
    to_launcher: list[str] = []
    to_command: list[str] = []
    current = to_command
    for item in argv:
        if item.startswith("--"):
            current = to_launcher if item.split("=")[0] in launcher_options else to_command
        current.append(item)
    return to_launcher, to_command
