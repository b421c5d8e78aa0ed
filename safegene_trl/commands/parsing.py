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


_OVERRIDE = "--safegene."


@dataclass
class SafeGeneArguments:
    """The `safegene:` block of a recipe.

    Args:
        safegene: Keys of `SafeGeneConfig`. Without it the training runs without the safety step.
    """

    safegene: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keys of SafeGeneConfig, as a YAML block or as JSON on the command line."}
    )

    def block(self) -> dict[str, Any]:
        """The block's keys and values; empty without one."""
        block = yaml.safe_load(self.safegene) if isinstance(self.safegene, str) else self.safegene
        if not isinstance(block, dict | None):
            raise ConfigError("`safegene` must be a block of keys and values.")
        return block or {}

    @property
    def config(self) -> SafeGeneConfig | None:
        return None if self.safegene is None else SafeGeneConfig.from_dict(self.block())


def make_parser(dataclasses: Sequence[Any], prog: str | None = None, description: str | None = None) -> TrlParser:
    """The parser of a command whose options are the dataclasses' fields."""
    return TrlParser(list(dataclasses), prog=prog, description=description, allow_abbrev=False)


def parse(dataclasses: Sequence[Any], argv: Sequence[str], prog: str, description: str) -> tuple[Any, ...]:
    """Parses `argv` (with an optional `--config recipe.yaml`) into one instance of each dataclass.

    `--safegene.KEY VALUE` sets one key of the recipe's `safegene` block, `--safegene.gate.KEY VALUE` one of its `gate` block.

    Raises:
        ConfigError: The recipe cannot be read, or a key or option is unknown.
    """
    parser = make_parser(dataclasses, prog, description)
    known = [action.dest for action in parser._actions if action.dest not in ("help", argparse.SUPPRESS)]
    argv, overrides = _split_overrides(argv)
    recipe = _read_recipe(argv) if "--config" in argv else {}
    reject_unknown_keys(recipe, [*known, "env"], where="the recipe")
    *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    options = {item.removeprefix("--").split("=")[0]: None for item in unknown if item.startswith("--")}
    reject_unknown_keys(options, known, where="the command line")
    if unknown:
        raise ConfigError(f"`{unknown[0]}` on the command line belongs to no option: write `--option value`.")
    for arguments in parsed:
        if isinstance(arguments, SafeGeneArguments) and overrides:
            arguments.safegene = _merged(arguments.block(), overrides)
    return tuple(parsed)


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    items = iter(argv)
    for item in items:
        if item.startswith(_OVERRIDE):
            key, equals, value = item.removeprefix(_OVERRIDE).partition("=")
            _set(overrides, key.split("."), yaml.safe_load(value if equals else next(items, "")))
        elif item.startswith("--config="):  # TRL's parser knows the two-word form only
            rest += item.split("=", 1)
        else:
            rest.append(item)
    return rest, overrides


def _set(block: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        block = block.setdefault(key, {})
    block[path[-1]] = value


def _merged(block: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`block` with changes, blocks in it merged with theirs."""
    both = {key: _merged(block[key], value) for key, value in changes.items() if _are_blocks(block.get(key), value)}
    return block | changes | both


def _are_blocks(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


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
