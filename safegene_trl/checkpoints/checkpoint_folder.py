"""All of a full checkpoint but its weights: configs, tokenizer, chat template, the index of its
files.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.shapes import class_name
from ..models.parameters import base_model
from .output import saving
from .tensor_file import SAFE_WEIGHTS_INDEX_NAME


def write_index(index: Mapping[str, Any], folder: Path) -> None:
    """Writes the index of a checkpoint of more than one file."""
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def save_record(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    mark: Mapping[str, Any] | None,
) -> None:
    """Writes all of a checkpoint but the weights: configs, tokenizer, chat template."""
    base = base_model(model)
    config = deepcopy(base.config)  # the live model stays the plain fine-tune
    config.architectures = [class_name(base)]  # unset where the model was built from a config
    for key, value in (mark or {}).items():
        setattr(config, key, value)
    with saving("the model's config"):
        config.save_pretrained(folder)
    if base.generation_config is not None:
        with saving("the generation config"):
            base.generation_config.save_pretrained(folder)
    with saving("the tokenizer"):
        tokenizer.save_pretrained(folder)
