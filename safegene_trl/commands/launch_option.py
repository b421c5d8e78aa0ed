"""The option `--accelerate_config`."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..errors import ConfigError


OPTION = "--accelerate_config"
_SHIPPED = files("safegene_trl").joinpath("accelerate_configs")


def wants_launch(argv: Sequence[str]) -> bool:
    """Whether `--accelerate_config` is among the arguments."""
    return any(item.split("=")[0] == OPTION for item in argv)


def take_config(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """The file that `--accelerate_config` names, and the other arguments."""
    words = [
        word
        for item in argv
        for word in (item.split("=", 1) if item.startswith(f"{OPTION}=") else [item])
    ]
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
