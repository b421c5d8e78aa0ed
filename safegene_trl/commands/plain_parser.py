"""argparse whose errors are one plain sentence: no usage, which would bury it, and the nearest
option for a misspelt one.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ..config.validation import check_length, nearest
from ..errors import ConfigError
from .output import list_options


_KINDS = {"int": "a whole number", "float": "a number"}


class PlainErrors(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse prints its usage and exits. Lists what every command takes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        list_options(self)

    def error(self, message: str) -> NoReturn:
        refuse(message)


class PlainParser(PlainErrors):
    """The parser of a command with few options, each of which may be written with dashes too."""

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """What the words say; a misspelt option is named before what is missing because of it.

        Raises:
            ConfigError: An option is none, has no value or one of the wrong type, or is missing.
        """
        check_words(argv)
        words = self.with_underscores(argv)
        for name in unknown_options(words, self):
            raise ConfigError(self.unknown(name))
        found, unknown = self.parse_known_args(words)
        if unknown:
            raise ConfigError(f"`{unknown[0]}` on the command line is one too many: leave it out.")
        return found

    def with_underscores(self, argv: Sequence[str]) -> list[str]:
        """`--private-key` as `--private_key`."""
        words = []
        for word in argv:
            name, equals, value = word.partition("=")
            ours = f"--{name[2:].replace('-', '_')}"
            known = name.startswith("--") and ours in self._option_string_actions
            words.append(f"{ours}{equals}{value}" if known else word)
        return words

    def unknown(self, name: str) -> str:
        """The sentence for an option that is none."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        return f"There is no option `{name}`{nearest(name, known, 0.0)}"


def check_words(argv: Sequence[str]) -> None:
    """Raises `ConfigError` for a word of a command line that is too long for a path, and no JSON."""
    for word in argv:
        name, _, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not value.lstrip().startswith(("{", "[")):
            check_length(f"`{name}`" if name else f"`{word[:40]}…`", value)


def refuse(message: str) -> NoReturn:
    """Raises `ConfigError` for an error of argparse."""
    raise ConfigError(in_plain_words(message))


def unknown_options(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words that argparse would take for an option, and that are none of the parser's or, where
    it allows that, the beginning of one.
    """
    known = list(parser._option_string_actions)
    unknown = []
    for word in argv:
        if word == "--":
            break
        name = word.split("=")[0]
        begins = parser.allow_abbrev and any(option.startswith(name) for option in known)
        # with a space in it a word is a value, whatever it begins with
        if word.startswith("--") and name not in known and not begins and " " not in word:
            unknown.append(name)
    return unknown


def in_plain_words(message: str) -> str:
    """An error of argparse as a sentence that says what to do."""
    of_option = re.fullmatch(r"argument ([^/\s]+?)(?:/\S+)?: (.+)", message, re.DOTALL)
    if of_option:
        return _of_option(*of_option.groups())
    start, _, names = message.partition("required: ")
    if names and start == "the following arguments are ":
        wanted = [f"`{name.split('/')[0]}`" for name in names.split(", ")]
        verb = "is" if len(wanted) == 1 else "are"
        return f"{' and '.join(wanted)} {verb} missing: `--help` says what to give."
    return f"{message[:1].upper()}{message[1:]}: `--help` lists the options."


def _of_option(option: str, what: str) -> str:
    wrong = re.fullmatch(r"invalid (\w+) value: (.+)", what, re.DOTALL)
    if wrong and wrong[1] in _KINDS:
        return f"`{option}` is {wrong[2]}: it must be {_KINDS[wrong[1]]}."
    choice = re.fullmatch(r"invalid choice: (.+) \(choose from (.+)\)", what, re.DOTALL)
    if choice:
        return f"`{option}` is {choice[1]}: use one of {choice[2]}."
    truth = re.match(r"Truthy value expected: got (.+) but expected", what)
    if truth:
        return f"`{option}` is {truth[1]!r}: it must be true or false."
    if re.fullmatch(r"expected .*arguments?", what):
        return f"`{option}` has no value: write one behind it."
    return f"`{option}` cannot be read ({what.rstrip('.')}): `--help` says what to give."
