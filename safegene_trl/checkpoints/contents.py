"""Which files of a folder are ours: a folder with any other file is never replaced."""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError


MARKER = "safegene_report.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAFEGUARDED = "safegene"  # in the header of an adapter's weights: a vector is folded into them
TOUCH_UP = "touch_up/safegene_touch_up.safetensors"  # what was learned beside the vector
TRAINER_STATE = "trainer_state.json"  # in a checkpoint of a `Trainer`
# what a fleet's folder holds beside its checkpoints
FLEET_STATE, FLEET_WORKSHOP = "fleet.json", "fleet"

_EVIDENCE = r"safegene_report\.(json|html|coefficients\.png|history\.png)|README\.md"
_WEIGHTS = r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
_CONFIGS = r"((generation_|adapter_|processor_|(video_|feature_)?preprocessor_)?config)\.json"
_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|tekken)\.json|(vocab|merges)\.txt"
    r"|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
    r"|(tokenizer|spiece|sentencepiece\.bpe|spm)\.model|(source|target)\.spm|bpe\.codes"
)


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this package writes.

    Attributes:
        marker: The file that every one of them holds.
        names: Pattern of the files that one may hold, relative to it and with `/` between parts.
        recorded: Whether the marker's `files` names all of them but its reports, since that has
            been kept.
    """

    marker: str
    names: re.Pattern[str]
    recorded: bool = False


CHECKPOINT = FolderKind(
    MARKER,
    re.compile(
        f"{_EVIDENCE}|{re.escape(TOUCH_UP)}|(adapter/)?({_WEIGHTS}|{_CONFIGS}|{_TOKENIZER}|README\\.md)"
    ),
    recorded=True,
)
VECTOR = FolderKind(
    "safegene_config.json",
    re.compile(
        r"safegene_config\.json|adapter_model\.safetensors|safety_prompts\.jsonl|adapter_config\.json|model\.sig|audit\.json|README\.md"
    ),
)


def check_replaceable(folder: Path, kind: FolderKind, target: Path | None = None) -> None:
    """Raises `OutputError` if something were lost where the folder is replaced: it is no folder, or
    holds a file that is not ours.

    An empty folder may be replaced, a missing one is none. One that another process replaces
    meanwhile is looked at again.

    Args:
        folder: Where it is.
        kind: What it must be.
        target: Where it was, for the message.
    """
    name, foreign = target or folder, None
    for _ in range(10):
        try:
            before = folder.lstat()
            if stat.S_ISLNK(before.st_mode):
                raise OutputError(
                    f"{name} is a symbolic link: name the folder it points to as `output_dir`."
                )
            if not stat.S_ISDIR(before.st_mode):
                raise OutputError(f"{name} is a file: choose another `output_dir`.")
            foreign = foreign_file(folder, kind)
            if folder.lstat().st_ino == before.st_ino:
                break
        except FileNotFoundError:
            if not os.path.lexists(folder):
                return
    if foreign is not None:
        raise OutputError(
            f"{name} holds files that SafeGene did not write, e.g. {foreign}: choose another `output_dir`, or move them away."
        )


def check_no_link(folder: Path) -> None:
    """Raises `OutputError` for a folder to write into that is a symbolic link, or a file."""
    if os.path.islink(folder):
        raise OutputError(
            f"{folder} is a symbolic link: name the folder it points to as `output_dir`."
        )
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OutputError(f"{folder} is a file: choose another `output_dir`.")


def foreign_file(folder: Path, kind: FolderKind) -> str | None:
    """A file in the folder that is not ours, None where there is none."""
    files = sorted(_files(folder))
    ours = _ours(folder, kind) if kind.marker in files else lambda name: False
    return next((name for name in files if not ours(name) or (folder / name).is_symlink()), None)


def _ours(folder: Path, kind: FolderKind) -> Callable[[str], Any]:
    if kind.recorded:
        try:
            record = json.loads((folder / kind.marker).read_bytes())["files"]
        except (
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ):  # written before there was a record
            return kind.names.fullmatch
        if isinstance(record, dict):
            reports = re.compile(_EVIDENCE)
            return lambda name: name in record or reports.fullmatch(name)
    return kind.names.fullmatch


def _files(folder: Path, inside: str = "") -> Iterator[str]:
    """All that is no folder, links and devices as well."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), f"{inside}{entry.name}/")
            else:
                yield inside + entry.name
