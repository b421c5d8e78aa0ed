"""One way of checking settings: the type of every value by the dataclass's own type hints, its
range by a table of `Rule`s.

A dataclass of settings has a class variable `RULES` with a `Rule` for every field that its type
says too little about. Whatever is not known to be right is refused: a quoted boolean, a number in
quotes, NaN, an empty string, a string where a list belongs.
"""

import difflib
import functools
import json
import keyword
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ..errors import ConfigError
from ..text import read_json


LARGEST_COUNT = 2**31 - 1
Made = TypeVar("Made")
_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes, on Linux
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Rule:
    """What a value must be beyond its type.

    Attributes:
        at_least, at_most, above, below: Bounds of a number, or of every number in a list.
        choices: The strings that are possible.
        syntax: Raises `ValueError`, with what a string must be, for one that is not.
        share: Whether it is said of a number between 0 and 1 that it is a share.
        or_number: Whether a string may also be written as a number.
        too_low: What is said of a number that is too low, where its bound alone says too little.
        may_be_null: Whether somebody may write the key without a value. Only where nothing is
            checked, judged or pinned by it.
    """

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    syntax: Callable[[str], None] | None = None
    share: bool = False
    or_number: bool = False
    too_low: str = ""
    may_be_null: bool = False


COUNT, COUNT_OR_NONE = (Rule(at_least=least, at_most=LARGEST_COUNT) for least in (1, 0))
COUNT_OR_DEFAULT = Rule(at_least=0, at_most=LARGEST_COUNT, may_be_null=True)


class Settings(Protocol):
    """A dataclass with a table of rules."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    RULES: ClassVar[Mapping[str, Rule]]


def check_values(settings: Settings, prefix: str = "") -> None:
    """Raises `ConfigError` for the first field whose value has not the type of its hint, or breaks
    its rule.

    A field that still has its default "" is left to whoever needs it. A path in the place of a text
    becomes its text, and a tuple in the place of a list a list.

    Args:
        settings: A dataclass with its table `RULES`.
        prefix: Goes before every name in a message, e.g. `gate.`.
    """
    for name, hint in _hints(type(settings)).items():
        given = getattr(settings, name)
        value = _written(given, hint)
        if value is not given:
            setattr(settings, name, value)
        if value == "" and settings.__dataclass_fields__[name].default == "":
            continue
        check_value(prefix + name, value, hint, rule_of(type(settings), name))


def _written(value: Any, hint: Any) -> Any:
    """A value as a file would have it: a path's text, a tuple's list; any other value itself."""
    kinds = _kinds(hint)
    if isinstance(value, Path) and str in kinds:
        return str(value)
    if isinstance(value, list | tuple) and any(get_origin(kind) is list for kind in kinds):
        items = [str(item) if isinstance(item, Path) else item for item in value]
        return value if items == value else items
    return value


def check_written(
    values: Mapping[str, Any],
    kind: type[Settings],
    where: str,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Raises `ConfigError` for what somebody wrote and cannot have meant: an unknown key, or one
    without a value.

    Args:
        values: Keys and values as they were written.
        kind: The dataclass whose fields they are.
        where: Names the place in a message.
        elsewhere: As of `reject_unknown_keys`.
    """
    reject_unknown_keys(values, list(_hints(kind)), where, elsewhere)
    for name, value in values.items():
        if value is None and not (
            rule_of(kind, name).may_be_null and kind.__dataclass_fields__[name].default is None
        ):
            raise ConfigError(f"`{name}` in {where} has no value: write one, or leave the key out.")


def check_value(name: str, value: Any, hint: Any, rule: Rule = Rule()) -> None:
    """Raises `ConfigError` unless a value has the type of a hint and keeps a rule."""
    if value is None and _allows_none(hint):
        return
    wanted = [kind for kind in _kinds(hint) if kind is not type(None)]
    if (
        rule.or_number
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    ):
        return
    if isinstance(value, str) and str in wanted and not value.strip():
        raise ConfigError(f"`{name}` is empty: give it a value, or leave it out.")
    if not any(_fits(value, kind) for kind in wanted):
        raise ConfigError(f"`{name}` is {shown(value)}: {_must_be(value, wanted, rule)}")
    for item in value if isinstance(value, list) else [value]:
        _check_rule(name, item, rule)
    if not any(get_origin(kind) is dict for kind in wanted):  # which may be written as JSON
        check_length(f"`{name}`", value)


def reject_unknown_keys(
    values: Mapping[Any, Any],
    known: list[str],
    where: str,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Raises `ConfigError` for the first key of `values` that is not `known`, naming the nearest
    known key.

    Args:
        values: Keys and values.
        known: The keys that may be there.
        where: Names the place in a message.
        elsewhere: Keys that may not be there and could be meant, with what to write instead.
    """
    for key in values:
        if key not in known:
            group, dot, name = str(key).partition(".")
            if dot and key in (elsewhere or {}).values():
                raise ConfigError(
                    f"Unknown key `{key}` in {where}: a dot is for the command line, so write the key "
                    f"`{name}` in the block `{group}`."
                )
            raise ConfigError(
                f"Unknown key `{key}` in {where}{nearest(str(key), known, 0.0, elsewhere)}"
            )


def nearest(
    word: str, known: Iterable[str], cutoff: float = 0.6, elsewhere: Mapping[str, str] | None = None
) -> str:
    """The end of a sentence about a word that is not known: the first one that begins with it, else
    the nearest one, if any is near (0–1, 1 the same).
    """
    names = {name: name for name in known}
    written = {
        **names,
        **{name: place for name, place in (elsewhere or {}).items() if name not in names},
    }
    begun = [name for name in written if len(word) > 2 and name.startswith(word)]
    found = [word] if word in written else begun
    found = found or difflib.get_close_matches(word, list(written), n=1, cutoff=cutoff)
    return f"; did you mean `{written[found[0]]}`?" if found else "."


def named_fields(kind: type[Made]) -> type[Made]:
    """Decorates a dataclass of settings: a name that is no field is refused with the nearest one,
    where Python says less.
    """
    settings: Any = kind
    made = settings.__init__

    @functools.wraps(made)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        reject_unknown_keys(values, list(_hints(kind)), kind.__name__)
        made(self, *args, **values)

    settings.__init__ = checked
    settings.__setattr__ = _set_known
    return kind


def _set_known(self: Any, name: str, value: Any) -> None:
    """An attribute that is no setting would be set and never read."""
    if not name.startswith("_"):
        reject_unknown_keys({name: value}, names_of(type(self)), type(self).__name__)
    object.__setattr__(self, name, value)


def names_of(kind: type[Settings]) -> list[str]:
    """The keys of a dataclass of settings."""
    return list(_hints(kind))


def hint_of(kind: type[Settings], name: str) -> Any:
    """The type hint of a field, None where there is no such field."""
    return _hints(kind).get(name)


def rule_of(kind: type[Settings], name: str) -> Rule:
    """The rule of a field; the choices that argparse is told are one too."""
    rule = kind.RULES.get(name)
    if rule is None:
        rule = Rule(choices=tuple(kind.__dataclass_fields__[name].metadata.get("choices", ())))
    return rule


def takes_text(hint: Any) -> bool:
    """Whether a value of this hint is text and nothing else, so that digits of a command line are
    no number in it.
    """
    return all(kind in (str, type(None)) or isinstance(kind, str) for kind in _kinds(hint))


# What `apply_chat_template` takes itself: the rest goes to the template.
OF_THE_CALL = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("processor_kwargs", "sanitize_control_tokens"),
}
# What means something of its own in every template.
_OF_JINJA = {
    *("self", "super", "loop", "caller", "varargs", "kwargs", "context", "environment"),
    *("range", "dict", "namespace", "cycler", "joiner", "lipsum"),
    *("raise_exception", "strftime_now", "true", "false", "none"),
}


def is_template_options(values: Any) -> bool:
    """Whether `values` are arguments for a chat template: names that nothing else reads, with
    truth values, numbers and texts that JSON can hold.
    """
    return isinstance(values, dict) and all(
        isinstance(key, str)
        and key.isidentifier()
        and not keyword.iskeyword(key)
        and key not in OF_THE_CALL | _OF_JINJA
        and (value is None or isinstance(value, bool | int | float | str))
        and _is_strict(value)
        for key, value in values.items()
    )


def _is_strict(value: Any) -> bool:
    """Whether JSON holds a plain value as it is: a finite number, a text that UTF-8 can write."""
    try:
        str(value).encode()
        return bool(value == read_json(json.dumps(value)))
    except ValueError:
        return False


def template_options(name: str, given: Any) -> dict[str, Any]:
    """The arguments for a chat template that somebody has set, as a mapping, as JSON on a command
    line, or not at all.

    Raises:
        ConfigError: They are none.
    """
    values = {} if given is None else given
    if isinstance(given, str):
        with suppress(ValueError, RecursionError):
            values = read_json(given)
    if not is_template_options(values):
        raise ConfigError(
            f"`{name}` is {shown(values)}: give names that the chat template knows, none of them a word of Python's or "
            'Jinja\'s own, each with true, false, a finite number or a text in valid Unicode, as in `{"enable_thinking": false}`.'
        )
    return values


def check_length(what: str, value: Any) -> None:
    """Raises `ConfigError` for a text, or one in a list, that is too long for a path: whoever looks
    for a file of that name would fail.

    Args:
        what: Names it in a message.
        value: Any value; what is no text is left alone, and so is a URL.
    """
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str) or "://" in text:
            continue
        size = len(text.encode(errors="replace"))
        part = max(len(part.encode(errors="replace")) for part in text.split(os.sep))
        if size > _LONGEST_PATH or part > _LONGEST_NAME:
            raise ConfigError(
                f"{what} is too long ({size:,} bytes), as a path has at most {_LONGEST_PATH:,} bytes and a name in it "
                f"{_LONGEST_NAME}: give a shorter one."
            )


def written_place(path: str) -> None:
    """Raises `ValueError` for a path with `~`, which only a shell replaces: a folder of that name
    would be made.
    """
    if path.startswith("~"):
        raise ValueError(
            "`~` stands for no folder here, so write the path out (`./~` for a name that begins so)"
        )


def written_path(text: str) -> Path:
    """A path of a command line that is written to.

    Raises:
        ConfigError: It begins with `~`.
    """
    try:
        written_place(text)
    except ValueError as error:
        raise ConfigError(f"`{text}` cannot be written: {error}.") from error
    check_length("A path to write to", text)
    return Path(text)


def folder(path: str) -> None:
    """Raises `ValueError` for a path that names no folder of its own, like `.`, or begins with `~`."""
    written_place(path)
    if Path(path).name in ("", ".."):
        raise ValueError("it must name a folder of its own")


def repository(name: str) -> None:
    """Raises `ValueError` for what the hub takes as no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            "it must be the name of a repository on the hub, like `owner/name`"
        ) from error


def file_size(size: str) -> None:
    """Raises `ValueError` unless `save_pretrained` understands the size."""
    if not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]B", size, re.IGNORECASE) or float(size[:-2]) <= 0:
        raise ValueError("it must be a size like `5GB` or `500MB`")


def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind)}


def _kinds(hint: Any) -> list[Any]:
    """The single types of a union; the strings of a `Literal`."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return [kind for each in get_args(hint) for kind in _kinds(each)]
    return list(get_args(hint)) if origin is Literal else [hint]


def _allows_none(hint: Any) -> bool:
    return type(None) in _kinds(hint)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, str):  # of a `Literal`
        return isinstance(value, str) and value == kind
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if kind is str:
        return isinstance(value, str) and _is_writable(value)
    return type(value) is kind


def _is_writable(text: str) -> bool:
    """Whether a text can stand in a file and in a path: no NUL, and nothing that UTF-8 lacks."""
    return (
        bool(text.strip()) and "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
    )


def _must_be(value: Any, wanted: list[Any], rule: Rule) -> str:
    """What a value of the wrong type must be instead, as the end of a sentence."""
    choices = rule.choices or tuple(kind for kind in wanted if isinstance(kind, str))
    if choices:
        return f"use one of {', '.join(choices)}."
    kind = wanted[0]
    if isinstance(value, list) and str in wanted:
        return "it must be one string, not a list."
    if isinstance(value, str) and kind in (bool, int, float) and _is_unquoted(value, kind):
        return f"it must be {_NAMES[kind]}, without quotes."
    if kind is str and isinstance(value, str):
        return "it must be text without NUL or broken characters."
    if kind is str and isinstance(value, bool | int | float):
        return "it must be a string: put it in quotes."
    if get_origin(kind) is list:
        return "it must be a list of strings that are not empty."
    if rule.share:
        return "it must be a share between 0 and 1."
    return f"it must be {_NAMES.get(kind, 'a block of keys and values')}."


_NAMES = {str: "a string", bool: "true or false", int: "a whole number", float: "a finite number"}


def _is_unquoted(text: str, kind: type) -> bool:
    """Whether a text would have been right without its quotes."""
    if kind is bool:
        return text.lower() in ("true", "false", "yes", "no", "on", "off", "0", "1")
    try:
        return math.isfinite(kind(text))
    except ValueError:
        return False


def _check_rule(name: str, value: Any, rule: Rule) -> None:
    if rule.choices and value not in rule.choices:
        raise ConfigError(f"`{name}` is {shown(value)}: use one of {', '.join(rule.choices)}.")
    if rule.syntax is not None and isinstance(value, str):
        try:
            rule.syntax(value)
        except ValueError as error:
            raise ConfigError(f"`{name}` is {shown(value)}: {error}.") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    for bound, right, words in (
        (rule.at_least, lambda bound: value >= bound, "at least"),
        (rule.above, lambda bound: value > bound, "above"),
        (rule.at_most, lambda bound: value <= bound, "at most"),
        (rule.below, lambda bound: value < bound, "below"),
    ):
        if bound is not None and not right(bound):
            must = "a share between 0 and 1" if rule.share else f"{words} {bound}"
            said = rule.too_low if rule.too_low and words == "at least" else f"it must be {must}"
            raise ConfigError(f"`{name}` is {shown(value)}: {said}.")


def check_is(given: object, kind: type, where: str) -> None:
    """Raises `ConfigError` unless a function or class was given the config that it takes.

    Args:
        given: What it was given.
        kind: The dataclass that it takes.
        where: The function's or class's name.
    """
    if not isinstance(given, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ConfigError(
            f"{where} was given {shown(given)}: give it {article} {kind.__name__}, as in `{where}({kind.__name__}(…))`."
        )


def shown(value: Any) -> str:
    """A value in a message, short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
