"""YAML as people write it, read with one reader, files and options alike: a key that is there twice
is an error, and numbers are what they look like (YAML 1.2's).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError


_MERGE = "tag:yaml.org,2002:merge"


class _Reader(yaml.SafeLoader):
    """The safe loader, which by itself lets the last of several equal keys win without a word, and
    of a bad date tells no line.
    """

    def construct_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        based = re.match("0[xo]", text)
        return int(text, {"0x": 16, "0o": 8}[based[0]] if based else 10)

    def construct_fraction(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).replace("_", "").lower()
        return float(re.sub(r"\.(inf|nan)\Z", r"\1", text))

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError, KeyError) as error:  # of a tag that fits no value
            said = str(error) if isinstance(error, ValueError) else "the value does not fit its tag"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE or not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in lines:
                raise _DoubleKey(key, lines[key], line)
            lines[key] = line
        return super().construct_mapping(node, deep)


class _Writer(yaml.SafeDumper):
    """Puts text in quotes that is a number to any reader."""


# YAML 1.1, and so PyYAML, takes `1e-4` for a string, `010` for eight and `1:30` for ninety; YAML 1.2
# and everybody who writes it take them for a number, ten, and text.
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_DIGITS = "[0-9][0-9_]*"
_NUMBERS = {
    _INT: rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+",
    _FLOAT: rf"[-+]?({_DIGITS}(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Reader.yaml_implicit_resolvers = {
    first: [each for each in known if each[0] not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _NUMBERS.items():  # whole numbers first: the others' form has room for them
    for _kind in (_Reader, _Writer):
        _kind.add_implicit_resolver(_tag, re.compile(rf"({_form})\Z"), list("-+.0123456789"))
_Reader.add_constructor(_INT, _Reader.construct_number)
_Reader.add_constructor(_FLOAT, _Reader.construct_fraction)


class _Texts(_Reader):
    """Reads a number as the text that stands there."""

    def construct_text(self, node: yaml.ScalarNode) -> str:
        return str(self.construct_scalar(node))


for _tag in _NUMBERS:
    _Texts.add_constructor(_tag, _Texts.construct_text)


class _DoubleKey(yaml.YAMLError):
    """A key that stands twice in one mapping, and on which lines."""

    def __init__(self, key: Any, first: int, second: int):
        super().__init__()
        self.key, self.first, self.second = key, first, second


def read_yaml(path: Path, what: str, numbers_as_text: bool = False) -> dict[str, Any]:
    """The keys and values in a YAML file.

    Args:
        path: The file.
        what: Names it in a message, e.g. `The recipe`.
        numbers_as_text: Whether numbers are given as they are written, for somebody else to read.

    Raises:
        ConfigError: It cannot be read, is no YAML, has a key twice, or holds something else than
            keys and values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{what} {path} is not UTF-8: save it as that.") from error
    content = parse_yaml(text, f"{what} {path}", _Texts if numbers_as_text else _Reader)
    if not isinstance(content, dict):
        raise ConfigError(f"{what} {path} must hold keys and values.")
    return content


def as_yaml(content: Mapping[str, Any]) -> str:
    """Keys and values as a YAML text that `read_yaml`, and others, read as the same."""
    return yaml.dump(content, Dumper=_Writer, sort_keys=False)


def parse_yaml(text: str, what: str, loader: type[yaml.SafeLoader] = _Reader) -> Any:
    """What a YAML (or JSON) text holds.

    Raises:
        ConfigError: It is no YAML, or has a key twice.
    """
    try:
        return yaml.load(text, loader)
    except _DoubleKey as twice:
        lines = (
            f"on lines {twice.first} and {twice.second}"
            if twice.first != twice.second
            else f"on line {twice.first}"
        )
        raise ConfigError(
            f"{what} has the key `{twice.key}` twice, {lines}: keep one of them."
        ) from twice
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{what} is not valid YAML{_fault(error, text)}.") from error
    except yaml.reader.ReaderError as error:
        line, code = text.count("\n", 0, error.position) + 1, f"U+{error.character:04X}"
        raise ConfigError(
            f"{what} is not valid YAML in line {line}: it holds the character {code}."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{what} is not valid YAML: {words}.") from error


def _fault(error: yaml.MarkedYAMLError, text: str) -> str:
    """In which line something is wrong, and what, as a part of a sentence."""
    mark, begun = error.problem_mark or error.context_mark, error.context_mark
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    where = f" in line {mark.line + 1}: " if mark else ": "
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return f"{where}it begins with a tab, so indent it by spaces"
    problem = " ".join(str(error.problem or error.context).split())
    if mark and begun and begun.line != mark.line:
        problem += f" ({error.context} that begins in line {begun.line + 1})"
    return where + problem
