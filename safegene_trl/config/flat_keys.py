"""Keys of `SafeGeneConfig` from before they stood in groups. They work for one more release, with a
warning.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError
from .data import DataConfig
from .measure import MeasureConfig
from .output import OutputConfig
from .search import SearchConfig
from .validation import Settings, names_of, shown


GROUPS: dict[str, type[Settings]] = {
    "data": DataConfig,
    "search": SearchConfig,
    "measure": MeasureConfig,
    "output": OutputConfig,
}

logger = logging.getLogger(__name__)
PLACES = {  # flat key: its place
    name: f"{group}.{name}" for group, kind in GROUPS.items() for name in names_of(kind)
}


def grouped(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings with every flat key in its group, and the flat keys that there were.

    Raises:
        ConfigError: A key stands both by itself and in its group, or its group is no block of keys
            and values.
    """
    found = {key: value for key, value in values.items() if key not in PLACES}
    flat = [key for key in values if key in PLACES]
    for key in flat:
        group, _, name = PLACES[key].partition(".")
        block = found.get(group, {})
        if not isinstance(block, Mapping):  # an object of the group has a value for the key
            raise ConfigError(
                f"`{key}` stands beside `{group}`: put it in there, as `{PLACES[key]}`."
            )
        if name in block:
            raise ConfigError(f"`{key}` and `{PLACES[key]}` are one setting: keep the second.")
        found[group] = {**block, name: values[key]}
    return found, flat


def merged(block: Mapping[str, Any], changes: Mapping[str, Any], once: str = "") -> dict[str, Any]:
    """`block` with changes, blocks in it merged with theirs; `once` is the path of a block whose
    keys may not change.
    """
    both = dict(block)
    for key, value in changes.items():
        if isinstance(block.get(key), dict) and isinstance(value, dict):
            both[key] = merged(block[key], value, once and f"{once}.{key}")
        elif once and key in block:
            raise ConfigError(f"`{once}.{key}` is set twice on the command line: keep one of them.")
        elif isinstance(value, dict) and key in block:  # it would go without a word
            raise ConfigError(
                f"`{key}` must be a block of keys and values: it is {shown(block[key])}."
            )
        else:
            both[key] = value
    return both


def warn_of_flat_keys(flat: Iterable[str]) -> None:
    """One warning with the place of every flat key."""
    if moved := [f"`{key}` is now `{PLACES[key]}`" for key in dict.fromkeys(flat)]:
        logger.warning(
            "Settings stand in groups: %s. The next release no longer reads the old form.",
            ", ".join(moved),
        )
