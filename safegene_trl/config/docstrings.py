"""What a setting means: written once, in its dataclass's docstring, and read from there for
`--help` and the docs.
"""

import inspect
import re
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar


Made = TypeVar("Made")


def meanings(kind: type) -> dict[str, str]:
    """What the docstring's `Args` say of every field, in one line each; nothing where Python runs
    without docstrings.
    """
    section = (inspect.getdoc(kind) or "").partition("Args:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if entry := re.match(r" {4}(\w+): (.*)", line):
            name = entry[1]
            found[name] = entry[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return {each.name: found.get(each.name, "") for each in fields(kind)}


def with_help(kind: type[Made]) -> type[Made]:
    """Decorates a dataclass of options: `--help` says of each what the docstring says.

    A field's metadata `listed` is said after it: what a docstring cannot know.
    """
    owner: Any = kind
    said = meanings(owner)
    for each in fields(owner):
        metadata = dict(each.metadata)
        text = f"{said[each.name]} {metadata.pop('listed', '')}".strip()
        metadata["help"] = text.replace("%", "%%")  # as argparse wants it
        each.metadata = MappingProxyType(metadata)
    return kind
