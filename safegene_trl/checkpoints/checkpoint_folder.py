"""All of a full checkpoint but its weights: configs, tokenizer, chat template, the index of its
files.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed.shapes import class_name
from ..models.parameters import base_model
from .completeness import config_parts
from .portable_files import save_config, save_processor
from .tensor_file import SAFE_WEIGHTS_INDEX_NAME, plan_files
from .write_errors import saving


def write_index(index: Mapping[str, Any], folder: Path) -> None:
    """Writes the index of a checkpoint of more than one file."""
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


@dataclass(frozen=True)
class CheckpointFolder:
    """A full checkpoint to be: where it goes, and what lies there with the weights.

    Attributes:
        path: The folder.
        processor: The tokenizer, or the processor that holds it.
        max_shard_size: Most bytes of one weight file, e.g. `5GB`.
        mark: What its `config.json` says of the vector in the weights (see `lineage.py`).
        digests: SHA-256 in hex of the weight files that are written, by name.
    """

    path: Path
    processor: Any
    max_shard_size: str
    mark: Mapping[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def lay_out(self, contents: Mapping[str, Any]) -> dict[str, list[str]]:
        """Writes the index, where there is more than one weight file; returns each file's tensors.

        Args:
            contents: Data type and shape of every tensor, by name.
        """
        plan, index = plan_files(contents, self.max_shard_size)
        if index:
            write_index(index, self.path)
        return plan

    def save_record(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Writes all but the weights: configs, tokenizer, chat template.

        Args:
            model: The model, live or without weights.
            dtype: What `config.json` says of the weight files, by which they are loaded. Default:
                what the model's config says.
        """
        base = base_model(model)
        config = deepcopy(base.config)  # the live model stays the plain fine-tune
        config.architectures = [class_name(base)]  # unset where the model was built from a config
        if dtype is not None:
            for part in config_parts(config):
                if part is config or part.dtype is not None:
                    part.dtype = dtype
        for key, value in self.mark.items():
            setattr(config, key, value)
        with saving("the model's config"):
            save_config(config, self.path)
        if base.generation_config is not None:
            with saving("the generation config"):
                base.generation_config.save_pretrained(self.path)
        with saving("the tokenizer"):
            save_processor(self.processor, self.path, str(config._name_or_path or ""))
