"""What a model, a tokenizer and a data set were, as hashes that another machine can check."""

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase


_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"]


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the token → id table, added tokens included. Padding side and chat template do not enter."""
    return sha256_of_json(tokenizer.get_vocab())


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the chat template, None where there is none."""
    return sha256_of_json(tokenizer.chat_template) if tokenizer.chat_template else None


def model_reference(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Name, revision and SHA-256 of the weight and config files of a checkpoint or adapter.

    A local folder's own name is kept, not its place on this machine. A hub id is resolved in the local cache, where
    loading the model has put it.
    """
    path = Path(name_or_path)
    if path.is_dir():
        folder, name = path, path.resolve().name
    else:
        folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=_WEIGHT_FILES))
        name, revision = name_or_path, folder.name
    files = sorted(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern))
    return {"name": name, "revision": revision, "files": {file.name: sha256_of_file(file) for file in files}}


def software_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that decide its numbers."""
    packages = ("safegene-trl", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
