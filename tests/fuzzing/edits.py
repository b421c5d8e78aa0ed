"""Ways to change a vector's files, hashes renewed where they must be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .oracle import CONFIG, HASHED, record


Mutation = Callable[[Path], None]
DELETE = object()


def renew_hashes(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["files"] = {name: record(folder / name) for name in HASHED}
    (folder / CONFIG).write_text(json.dumps(config))


def set_in_config(*keys: str, value: Any) -> Mutation:
    """Sets or deletes what lies at the end of `keys`."""

    def mutate(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        place = config
        for key in keys[:-1]:
            place = place[key]
        if value is DELETE:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        (folder / CONFIG).write_text(json.dumps(config))

    return mutate


def replace_text(file: str, old: str, new: str) -> Mutation:
    def mutate(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text, f"{file} has no {old!r} to be replaced"
        (folder / file).write_text(text.replace(old, new, 1), errors="surrogateescape")
        if file != CONFIG:
            renew_hashes(folder)

    return mutate


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def link_to_a_copy(path: Path) -> None:
    """A link to an equal file elsewhere, as the hub's cache keeps a repository: `path` is the
    vector's own file, moved.
    """
    copy = path.with_name(f".{path.name}.copy")
    path.rename(copy)
    path.symlink_to(copy.name)
