"""Recipes and command-line arguments, through TRL's parser; an unknown key is an error that names
the nearest one.

TRL reads a recipe by itself, and takes whatever it finds there. So a recipe is read and checked
here before TRL sees it.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from trl import TrlParser

from ..config.flat_keys import PLACES, grouped, merged, warn_of_flat_keys
from ..config.settings import SafeGeneConfig, described, hint_at
from ..config.validation import check_value, check_written, reject_unknown_keys, rule_of, takes_text
from ..distributed.world_size import is_first_process
from ..errors import ConfigError
from ..text import one_line
from .launch_option import OPTION, told_of
from .output import set_by_recipe
from .plain_parser import PlainErrors, check_words, unknown_options
from .yaml_files import parse_yaml, read_yaml


_OPTION = "--safegene"
_KEY = "safegene."


@dataclass
class SafeGeneArguments:
    """The `safegene:` block of a recipe.

    Args:
        safegene: Keys of `SafeGeneConfig`. Without it the training runs without the safety step.
    """

    safegene: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keys of SafeGeneConfig, as a YAML block or as JSON on the command line."
        },
    )

    @property
    def config(self) -> SafeGeneConfig | None:
        return None if self.safegene is None else SafeGeneConfig.from_dict(_as_block(self.safegene))


class Parser(PlainErrors, TrlParser):
    """TRL's parser, with errors of one sentence."""


def make_parser(
    dataclasses: Sequence[Any], prog: str | None = None, description: str | None = None
) -> TrlParser:
    """The parser of a command whose options are the dataclasses' fields, and every key of a
    `safegene` block among them.
    """
    parser = Parser(
        list(dataclasses),
        prog=prog,
        description=description,
        epilog=told_of((prog or "").rpartition(" ")[2]),
        allow_abbrev=False,
    )
    if SafeGeneArguments in dataclasses:
        _add_keys(parser)
    return parser


def parse(
    dataclasses: Sequence[Any],
    argv: Sequence[str],
    prog: str,
    description: str,
    needed: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """Parses `argv` (with an optional `--config recipe.yaml`) into one instance of each dataclass.

    `--safegene.KEY VALUE` sets one key of the recipe's `safegene` block, `--safegene.GROUP.KEY
    VALUE` one of a group in it. They are options of TRL's parser like any other. Only their values
    are read here, since argparse neither joins blocks nor refuses a key that is there twice, and
    OmegaConf's dot-lists, which do join them, let the last of two win and take 'false' in quotes
    for false.

    Args:
        dataclasses: Their fields are the options.
        argv: The words of the command line.
        prog: The command, for its help.
        description: What it does, for its help.
        needed: Options that the command cannot do without, each with what is said where it is
            missing. It is said before anything that is wrong with TRL's settings.

    Raises:
        ConfigError: The recipe cannot be read, a key or option is unknown or there twice, or a
            value has the wrong type; or TRL refuses its settings, or one that is needed is missing.
    """
    check_words(argv)
    parser = make_parser(dataclasses, prog, description)
    argv = [
        word
        for item in argv
        for word in (item.split("=", 1) if item.startswith("--config=") else [item])
    ]
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    options = [action.dest for action in shown if action.dest != "help"]
    known = [name for name in options if not name.startswith(_KEY)]
    recipe, texts = _recipe(argv)
    reject_unknown_keys(recipe, [*known, "env"], where="the recipe")
    set_by_recipe(recipe, prog)
    for kind in dataclasses:
        _check_recipe(recipe, kind)
    _set_environment(recipe.pop("env", {}), texts)
    defaults = recipe | _texts_of_numbers(parser, dataclasses, recipe, texts)
    argv = _with_dashes_joined(argv, parser)
    _check_words(argv, parser)
    _check_options(argv, parser, options)
    *parsed, unknown = _parsed(parser, argv, defaults, needed or {})
    keys = vars(parsed.pop()) if len(parsed) > len(dataclasses) else {}
    if unknown:
        raise ConfigError(
            f"`{unknown[0]}` on the command line belongs to no option: write `--option value`."
        )
    for arguments in parsed:
        if isinstance(arguments, SafeGeneArguments):
            arguments.safegene = _block(recipe.get("safegene"), arguments.safegene, keys)
    return tuple(parsed)


def _check_options(
    argv: Sequence[str], parser: argparse.ArgumentParser, options: Sequence[str]
) -> None:
    """Raises `ConfigError` for a word that is written like an option and is none."""
    elsewhere = {_KEY + name: _KEY + place for name, place in PLACES.items()}
    # options too, though not of this parser
    elsewhere |= {name: name for name in ("config", OPTION.removeprefix("--"))}
    if "model_name_or_path" in options:
        elsewhere["model"] = "model_name_or_path"
    strange = [name for name in unknown_options(argv, parser) if name != "--config"]
    reject_unknown_keys(
        dict.fromkeys(name.removeprefix("--") for name in strange),
        list(options),
        where="the command line",
        elsewhere=elsewhere,
    )


def _parsed(
    parser: TrlParser, argv: Sequence[str], defaults: Mapping[str, Any], needed: Mapping[str, str]
) -> tuple[Any, ...]:
    """What TRL's parser makes of options and a recipe as it was read here: of the file itself its
    own reading would take other numbers.
    """
    parser.set_defaults_with_config(**defaults)
    argv = list(argv)
    if "--config" in argv:
        position = argv.index("--config")
        del argv[position : position + 2]
    found, _ = parser.parse_known_args(argv)
    for option, missing in needed.items():
        if not getattr(found, option):
            raise ConfigError(missing)
    try:
        return tuple(parser.parse_args_into_dataclasses(argv, return_remaining_strings=True))
    except ValueError as error:  # TRL checks its settings where it makes them
        raise ConfigError(_refusal(str(error))) from error


def _refusal(reason: str) -> str:
    """The sentence for settings that TRL or transformers refuses, with the first of its own."""
    first = one_line(reason).split(". ")[0].rstrip(".")
    remedy = "change the setting that it names"
    if "bf16" in first:
        remedy = "on a machine without such a GPU set `use_cpu: true` and `bf16: false`"
    return f"The training's settings are refused ({first}): {remedy}."


def _with_dashes_joined(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """`--option -1e-3` as `--option=-1e-3`: argparse would take most of what begins with a dash for
    an option of its own.
    """
    takers = {
        option
        for action in parser._actions
        for option in action.option_strings
        if action.nargs is None
    }
    joined: list[str] = []
    for word in argv:
        is_value = (
            word[:1] == "-" and word[:2] != "--" and word not in parser._option_string_actions
        )
        if is_value and joined and joined[-1] in takers:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _check_words(argv: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raises `ConfigError` for an option that is there twice, of which argparse would take the
    last, and for a key without a value.
    """
    names = {option: action.dest for action in parser._actions for option in action.option_strings}
    given = [names[name] for word in argv if (name := word.split("=")[0]) in names]
    for name in given:
        if given.count(name) > 1:
            raise ConfigError(f"`--{name}` is on the command line twice: leave one of them out.")
    for word, value in zip(argv, [*argv[1:], ""], strict=False):
        if names.get(word, "").startswith("safegene"):
            _check_given(word, value)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    """Makes every key of a `safegene` block an option."""
    options = parser.add_argument_group("safegene", "Keys of the recipe's `safegene` block.")
    shared: dict[str, Any] = {"default": argparse.SUPPRESS, "metavar": "VALUE"}
    for path, meaning in described():
        options.add_argument(
            f"--{_KEY}{path}", dest=f"{_KEY}{path}", help=meaning.replace("%", "%%"), **shared
        )
    for name in PLACES:
        options.add_argument(
            f"--{_KEY}{name}", dest=f"{_KEY}{name}", help=argparse.SUPPRESS, **shared
        )


def _block(recipe: Any, whole: Any, keys: Mapping[str, str]) -> dict[str, Any] | None:
    """The `safegene` block of a recipe, with what the command line sets in it; None where neither
    has one.

    Args:
        recipe: As it was read here: TRL's own reading of the recipe lets double keys pass.
        whole: What `--safegene` says, or TRL's reading.
        keys: The value of each `--safegene.PATH`.
    """
    if whole is None and not keys:
        return None
    given = _as_block(_value(_OPTION, whole, None)) if isinstance(whole, str) else {}
    for option, text in keys.items():
        path = option.removeprefix(_KEY)
        value = _value(f"--{option}", text, hint_at(path))
        for part in reversed(path.split(".")):
            value = {part: value}
        given = merged(given, value, once="safegene")
    written, flat = grouped({} if recipe is None else _as_block(recipe))
    given, more = grouped(given)
    if is_first_process():
        warn_of_flat_keys([*flat, *more])
    return merged(written, given)


def _as_block(block: Any) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise ConfigError("`safegene` must be a block of keys and values.")
    return block


def _check_recipe(recipe: Mapping[str, Any], kind: Any) -> None:
    """Raises `ConfigError` for a recipe's value that a dataclass of options cannot have.

    Of this package's own dataclasses every value is checked. Of TRL's, whose hints are looser than
    what they take, it is keys without a value and switches that are neither true nor false.
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
            raise ConfigError(
                f"`{name}` in the recipe has no value: write one, or leave the key out."
            )
        if (
            value is not None
            and bool in (hints[name], *get_args(hints[name]))
            and str not in get_args(hints[name])
        ):
            check_value(name, value, hints[name])


def _check_given(option: str, text: str) -> None:
    if not text.strip() or text.startswith("--"):
        raise ConfigError(f"`{option}` has no value: give it one, or leave the option out.")


def _value(option: str, text: str, hint: Any) -> Any:
    """The value of one option: text as it is where the key takes text, else YAML."""
    _check_given(option, text)
    if hint is not None and takes_text(hint) and text != "null" and text[0] not in "\"'":
        return text  # of a path with ` #` in it YAML would take the beginning
    return parse_yaml(text, f"`{option}`")


def _recipe(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe that `--config` names, and the same with its numbers as they are written; nothing
    without one.
    """
    if "--config" not in argv:
        return {}, {}
    position = list(argv).index("--config")
    if position + 1 >= len(argv):
        raise ConfigError("`--config` needs the path of a recipe.")
    path = Path(argv[position + 1])
    return read_yaml(path, "The recipe"), read_yaml(path, "The recipe", numbers_as_text=True)


def _set_environment(values: Any, texts: Mapping[str, Any]) -> None:
    """Sets the environment variables of a recipe: numbers as they are written, `0x10` or `1e5`."""
    check_value("env", values, dict[str, Any])
    for key, value in values.items():
        text = texts["env"][key] if _is_number(value) else str(value)
        if not isinstance(key, str) or not key or "=" in key or "\0" in key + text:
            raise ConfigError(f"`env` has {key!r}: that is no variable that can be set.")
        os.environ[key] = text


def _texts_of_numbers(
    parser: argparse.ArgumentParser,
    dataclasses: Sequence[Any],
    recipe: Mapping[str, Any],
    texts: Mapping[str, Any],
) -> dict[str, Any]:
    """The numbers of TRL's options as they are written, alone or in lists: argparse makes of a text
    what the option takes, so that a name like `12e45` stays one.
    """
    ours = {
        each.name
        for kind in dataclasses
        if hasattr(kind, "RULES") or kind is SafeGeneArguments
        for each in fields(kind)
    }
    found: dict[str, Any] = {}
    for action in parser._actions:
        name, value = action.dest, recipe.get(action.dest)
        if name in ours:
            continue
        if _is_number(value):
            found[name] = texts[name]
        elif isinstance(value, list) and any(map(_is_number, value)):
            try:
                found[name] = [
                    action.type(text) if callable(action.type) and _is_number(each) else each
                    for each, text in zip(value, texts[name], strict=True)
                ]
            except ValueError as error:
                raise ConfigError(f"`{name}` in the recipe has a wrong number: {error}.") from error
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
