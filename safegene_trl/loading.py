"""Finished checkpoints and adapters as live models."""

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .errors import UnsupportedModelError


ADAPTER_CONFIG = "adapter_config.json"


def adapter_base(name_or_path: str, revision: str | None = None) -> str | None:
    """The base model that an adapter directory or repository names, None if it is no adapter."""
    path = Path(name_or_path)
    if not path.is_dir():
        try:
            file = Path(hf_hub_download(name_or_path, ADAPTER_CONFIG, revision=revision))
        except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError):
            return None
    else:
        file = path / ADAPTER_CONFIG
    return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else None


def checkpoint_dtype(name_or_path: str, revision: str | None = None) -> str:
    """Name of the data type a checkpoint (of an adapter: its base model) was saved in, e.g. `bfloat16`."""
    base = adapter_base(name_or_path, revision)
    try:
        config = AutoConfig.from_pretrained(base or name_or_path, revision=None if base else revision)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"The model {base or name_or_path} cannot be loaded: {error}") from error
    return str(config.dtype or torch.float32).removeprefix("torch.")


def load_model(name_or_path: str, revision: str | None = None, dtype: str = "auto") -> nn.Module:
    """A causal language model in eval mode; an adapter stays a PEFT model on its base. Custom code is never run."""
    base = adapter_base(name_or_path, revision)
    kwargs = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "use_safetensors": True}
    try:
        if base is None:
            return AutoModelForCausalLM.from_pretrained(name_or_path, revision=revision, **kwargs).eval()
        model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        return PeftModel.from_pretrained(model, name_or_path, revision=revision).eval()
    except (OSError, ValueError) as error:
        named = name_or_path if base is None else f"{name_or_path} (on {base})"
        raise UnsupportedModelError(f"The model {named} cannot be loaded: {error}") from error


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; an adapter without one has its base model's."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        base = adapter_base(name_or_path, revision)
        if base is None:
            raise UnsupportedModelError(f"The tokenizer of {name_or_path} cannot be loaded: {error}") from error
        return load_tokenizer(base)
