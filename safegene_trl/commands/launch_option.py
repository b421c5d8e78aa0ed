"""The option `--accelerate_config`."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..errors import ConfigError


OPTION = "--accelerate_config"
_DASHED = OPTION.replace("_", "-")
LAUNCHED = ("sft", "apply", "extract", "evaluate")
_SHIPPED = files("safegene_trl").joinpath("accelerate_configs")


def told_of(command: str) -> str:
    """What the help of a command says of the options that its parser does not know."""
    told = "Options may stand in a YAML file: --config FILE."
    if command in LAUNCHED:
        told += (
            f" {OPTION} NAME_OR_FILE runs it in many processes; accelerate's options, as --num_processes, --num_machines, "
            "--machine_rank, --main_process_ip and --main_process_port, go with it."
        )
    return told


def wants_launch(argv: Sequence[str]) -> bool:
    """Whether `--accelerate_config` is among the arguments."""
    return any(item.split("=")[0] in (OPTION, _DASHED) for item in argv)


def take_config(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """The file that `--accelerate_config` names, and the other arguments."""
    words: list[str] = []
    for item in argv:
        name, equals, value = item.partition("=")
        if name in (OPTION, _DASHED):
            words += [OPTION, value] if equals else [OPTION]
        else:
            words.append(item)
    position = words.index(OPTION)
    named = words[position + 1] if position + 1 < len(words) else ""
    rest = words[:position] + words[position + 2 :]
    shipped = {file.name.removesuffix(".yaml"): Path(str(file)) for file in _SHIPPED.iterdir()}
    path = Path(named) if Path(named).is_file() else shipped.get(named)
    if path is None:
        raise ConfigError(
            f"`{OPTION} {named}` is neither a file nor one of {', '.join(sorted(shipped))}: write one of these."
        )
    return path, rest
