"""Recipes and command-line arguments, through TRL's parser; an unknown key is an error that names the nearest one."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from ..config import SafeGeneConfig, reject_unknown_keys
from ..errors import ConfigError


_LAUNCH_ONLY = ("env", "config")


@dataclass
class SafeGeneArguments:
    """The `safegene:` block of a recipe.

    Args:
        safegene: Keys of `SafeGeneConfig`. Without it the training runs without the safety step.
    """

    safegene: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keys of SafeGeneConfig, as a YAML block or as JSON on the command line."}
    )

    @property
    def config(self) -> SafeGeneConfig | None:
        if self.safegene is None:
            return None
        block = yaml.safe_load(self.safegene) if isinstance(self.safegene, str) else self.safegene
        if not isinstance(block, dict):
            raise ConfigError("`safegene` must be a block of keys and values.")
        return SafeGeneConfig.from_dict(block)


def parse(dataclasses: Sequence[Any], argv: Sequence[str], prog: str, description: str) -> tuple[Any, ...]:
    """Parses `argv` (with an optional `--config recipe.yaml`) into one instance of each dataclass.

    Raises:
        ConfigError: The recipe cannot be read, or a key or option is unknown.
    """
    parser = TrlParser(list(dataclasses), prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE", help="YAML file with values for the options below.")
    known = [action.dest for action in parser._actions if action.dest != argparse.SUPPRESS]
    if "--config" in argv:
        reject_unknown_keys(_read_recipe(argv), [*known, *_LAUNCH_ONLY], where=f"the recipe {_recipe_path(argv)}")
    parser._actions = [action for action in parser._actions if action.dest != "config"]
    *parsed, unknown = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    options = {item.removeprefix("--").split("=")[0]: None for item in unknown if item.startswith("--")}
    reject_unknown_keys(options, known, where="the command line")
    if unknown:
        raise ConfigError(f"`{unknown[0]}` on the command line belongs to no option: write `--option value`.")
    return tuple(parsed)


def _recipe_path(argv: Sequence[str]) -> Path:
    position = list(argv).index("--config")
    if position + 1 >= len(argv):
        raise ConfigError("`--config` needs the path of a recipe.")
    return Path(argv[position + 1])


def _read_recipe(argv: Sequence[str]) -> dict[str, Any]:
    path = _recipe_path(argv)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The recipe {path} is not valid YAML: {error}.") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"The recipe {path} must hold keys and values.")
    return recipe
