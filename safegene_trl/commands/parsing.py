"""Recipes and command-line arguments, through TRL's parser; an unknown key is an error that names the nearest one.

TRL reads a recipe by itself, and takes whatever it finds there. So a recipe is read and checked here before TRL sees it.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from trl import TrlParser

from ..config.gate import GateConfig
from ..config.settings import SafeGeneConfig
from ..config.validation import check_value, check_written, hint_of, reject_unknown_keys, rule_of, takes_text
from ..errors import ConfigError
from .yaml_files import parse_yaml, read_yaml


_OPTION = "--safegene"
_OVERRIDE = f"{_OPTION}."


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
        block = parse_yaml(self.safegene, "`safegene`") if isinstance(self.safegene, str) else self.safegene
        return {} if self.safegene is None else _as_block(block)

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
        ConfigError: The recipe cannot be read, a key or option is unknown or there twice, or a value has the wrong type.
    """
    parser = make_parser(dataclasses, prog, description)
    known = [action.dest for action in parser._actions if action.dest not in ("help", argparse.SUPPRESS)]
    argv, overrides = _split_overrides(argv)
    recipe = read_yaml(_recipe_path(argv), "The recipe") if "--config" in argv else {}
    reject_unknown_keys(recipe, [*known, "env"], where="the recipe")
    check_value("env", recipe.get("env", {}), dict[str, Any])
    for kind in dataclasses:
        _check_recipe(recipe, kind)
    _check_single(argv, parser)
    *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    options = {item.removeprefix("--").split("=")[0]: None for item in unknown if item.startswith("--")}
    reject_unknown_keys(options, known, where="the command line")
    if unknown:
        raise ConfigError(f"`{unknown[0]}` on the command line belongs to no option: write `--option value`.")
    for arguments in parsed:
        if isinstance(arguments, SafeGeneArguments):
            _set_block(arguments, recipe, overrides)
    return tuple(parsed)


def _check_single(argv: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raises `ConfigError` for an option that is there twice: argparse would take the last without a word."""
    names = {option: action.dest for action in parser._actions for option in action.option_strings}
    given = [names[name] for word in argv if (name := word.split("=")[0]) in names]
    for name in given:
        if given.count(name) > 1:
            raise ConfigError(f"`--{name}` is on the command line twice: leave one of them out.")


def _set_block(arguments: SafeGeneArguments, recipe: Mapping[str, Any], overrides: dict[str, Any]) -> None:
    """The block as it was read here: TRL's own reading of the recipe lets double keys pass."""
    if "safegene" in recipe:
        arguments.safegene = _as_block(recipe["safegene"])
    if overrides:
        arguments.safegene = _merged(arguments.block(), overrides)


def _as_block(block: Any) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise ConfigError("`safegene` must be a block of keys and values.")
    return block


def _check_recipe(recipe: Mapping[str, Any], kind: Any) -> None:
    """Raises `ConfigError` for a recipe's value that a dataclass of options cannot have.

    Of this package's own dataclasses every value is checked. Of TRL's, whose hints are looser than what they take, it is keys without a
    value and switches that are neither true nor false.
    """
    hints = get_type_hints(kind)
    defaults = {each.name: each.default for each in fields(kind) if each.name in recipe}
    written = {name: recipe[name] for name in defaults}
    if hasattr(kind, "RULES"):
        check_written(written, kind, where="the recipe")
        for name, value in written.items():
            check_value(name, value, hints[name], rule_of(kind, name))
        return
    for name, value in written.items():
        if value is None and (defaults[name] is not None or name == "safegene"):
            raise ConfigError(f"`{name}` in the recipe has no value: write one, or leave the key out.")
        if value is not None and bool in (hints[name], *get_args(hints[name])) and str not in get_args(hints[name]):
            check_value(name, value, hints[name])


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The options that TRL is to see, and the `safegene` block that the others make up."""
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    items = iter(argv)
    for item in items:
        option, equals, value = item.partition("=")
        if option == _OPTION or option.startswith(_OVERRIDE):
            path = option.removeprefix(_OPTION).removeprefix(".").split(".") if option != _OPTION else []
            _set(overrides, path, _override(option, path, value if equals else next(items, "")))
        elif item.startswith("--config="):  # TRL's parser knows the two-word form only
            rest += item.split("=", 1)
        else:
            rest.append(item)
    return rest, overrides


def _override(option: str, path: Sequence[str], text: str) -> Any:
    """The value of one option: text as it is where the key takes text, else YAML."""
    if not text.strip() or text.startswith("--"):
        raise ConfigError(f"`{option}` has no value: give it one, or leave the option out.")
    value = parse_yaml(text, f"`{option}`")
    kind = GateConfig if len(path) == 2 and path[0] == "gate" else SafeGeneConfig
    hint = hint_of(kind, path[-1]) if path else None
    return text if hint is not None and takes_text(hint) and not isinstance(value, str | None) else value


def _set(block: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Puts a value into a block of blocks, where none may be yet; a block as value goes in key by key."""
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            _set(block, [*path, str(key)], item)
        return
    if not path:
        _as_block(value)
    for depth, key in enumerate(path[:-1], start=1):
        block = block.setdefault(key, {})
        if not isinstance(block, dict):
            raise _double(path[:depth])
    if path[-1] in block:
        raise _double(path)
    block[path[-1]] = value


def _double(path: Sequence[str]) -> ConfigError:
    return ConfigError(f"`safegene.{'.'.join(path)}` is set twice on the command line: keep one of them.")


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
