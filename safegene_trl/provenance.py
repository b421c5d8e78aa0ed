"""What a model, a tokenizer and a data set were, as hashes that another machine can check."""

import hashlib
import json
import logging
import platform
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FamilyError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"]


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Sequence[Path]) -> list[str]:
    """The same of several, at a time: a checkpoint's files of some gigabytes take seconds each."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256_of_file, paths))


def sha256_of_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of the token → id table, added tokens included. Padding side and chat template do not
    enter.
    """
    return sha256_of_json(tokenizer.get_vocab())


def chat_template_hash(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Hash of the chat template, None where there is none."""
    return sha256_of_json(tokenizer.chat_template) if tokenizer.chat_template else None


def model_reference(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Name, revision and SHA-256 of the weight and config files of a checkpoint or adapter.

    A local folder's own name is kept, not its place on this machine. A hub id is resolved in the
    local cache, where loading the model has put it.
    """
    path = Path(name_or_path)
    if path.is_dir():
        folder, name = path, path.resolve().name
    else:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name_or_path, revision=revision, local_files_only=True))
        name, revision = name_or_path, folder.name
    files = sorted(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern))
    hashes = {file: known for file in files if (known := _known_hash(file))}
    unknown = [file for file in files if file not in hashes]
    hashes |= dict(zip(unknown, sha256_of_files(unknown), strict=True))
    return {
        "name": name,
        "revision": revision,
        "files": {file.name: hashes[file] for file in files},
    }


def _known_hash(file: Path) -> str | None:
    """SHA-256 of a large file in the hub's cache, which names it by that and checked it when it
    downloaded it; None for any other file.
    """
    target = file.resolve().name
    return target if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", target) else None


def check_base(
    name: str | None,
    revision: str | None,
    aligned: dict[str, Any],
    allow_other: bool,
    hash_files: bool = True,
    carries_vector: bool = False,
) -> dict[str, Any]:
    """Whether a fine-tune started from the weights that a vector's aligned model has.

    Args:
        name: Directory or hub id of the checkpoint it started from, None where that is not known.
        revision: Its revision.
        aligned: The vector's record of its aligned model, as from `model_reference`.
        allow_other: Whether other weights are an entry in the record and no error.
        hash_files: False for a rank that leaves reading the files to another.
        carries_vector: Whether the fine-tune says that it started from a checkpoint of this family
            safeguarded before, whose weights are others by that alone.

    Returns:
        For the report: the reference of the checkpoint, `is_aligned_model` (None where it cannot be
            told), `other_base_allowed` and
        `carries_vector`.

    Raises:
        FamilyError: The weights are others.
    """
    reference: dict[str, Any] = {"name": name, "revision": revision, "files": {}}
    if name and hash_files:
        from huggingface_hub.errors import HFValidationError

        try:
            reference = model_reference(name, revision)
        except (
            OSError,
            HFValidationError,
        ):  # trained from an object in memory, or its files are gone
            logger.warning(
                "The files of %s cannot be read, so the report cannot say which weights they hold.",
                name,
            )
    same = same_weights(reference, aligned)
    if same is False and not (allow_other or carries_vector):
        raise FamilyError(
            f"The fine-tune started from {_named(reference)}, and the safety vector was made from {_named(aligned)}, whose weights "
            "are others: use a vector of these weights, or set `allow_other_base: true`, which the same weights need too where "
            "they are stored otherwise (quantised, or as another class, e.g. of text and images)."
        )
    return {
        **reference,
        "is_aligned_model": same,
        "other_base_allowed": allow_other,
        "carries_vector": carries_vector,
    }


def same_weights(reference: dict[str, Any], other: dict[str, Any]) -> bool | None:
    """Whether two references are of the same weights, told by their files' hashes; None where one of
    them has none.
    """
    ours, theirs = weight_hashes(reference), weight_hashes(other)
    if not ours or not theirs:
        return None
    both = ours.keys() & theirs.keys()  # one of the two may lie beside further files
    return bool(both) and all(ours[file] == theirs[file] for file in both)


def weight_hashes(reference: dict[str, Any]) -> dict[str, str]:
    """The hashes of the weight files in a reference."""
    return {
        file: value
        for file, value in reference.get("files", {}).items()
        if file.endswith(".safetensors")
    }


def _named(reference: dict[str, Any]) -> str:
    return reference["name"] + (
        f" at revision {reference['revision']}" if reference.get("revision") else ""
    )


def software_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that decide its numbers."""
    packages = ("safegene-trl", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
