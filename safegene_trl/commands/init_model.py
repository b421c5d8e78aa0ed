"""What `safegene init` finds out about a model: by its config, its tokenizer and its shapes, never by
its weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from ..checkpoints.loading import check_readable, load_tokenizer
from ..checkpoints.skeleton import load_skeleton
from ..checkpoints.source import adapter_base, holds_no_model, stored_file
from ..errors import UnsupportedModelError
from ..estimation.training import ModelSizes
from ..models.experts import can_be_changed, expert_weights, matrix_shapes
from ..models.names import shared_parameter
from ..models.parameters import text_modules
from ..models.supported import layers_without_lora
from ..text import printable, read_json
from .init_plan import in_words


_OF_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}  # whatever the block around it is called
# PEFT puts a LoRA on these where experts have parameters of such names
_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}


@dataclass(frozen=True)
class FoundModel:
    """A model as its config, tokenizer and shapes tell it.

    Attributes:
        name: Directory or hub id.
        revision: Its branch, tag or commit on the hub.
        model_type: What its config calls its architecture.
        skeleton: The model without weights.
        tokenizer: Its tokenizer.
        sizes: Its sizes, with a LoRA where `targets` says.
        targets: The layers that a LoRA goes on; None for all linear ones.
        experts: How many a layer has; 0 of a dense model.
    """

    name: str
    revision: str | None
    model_type: str
    skeleton: nn.Module
    tokenizer: PreTrainedTokenizerBase
    sizes: ModelSizes
    targets: list[str] | None
    experts: int

    @property
    def tied(self) -> bool:
        """Whether embeddings and head are one tensor."""
        model: Any = self.skeleton
        return bool(getattr(model, "all_tied_weights_keys", None))

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def describe(self) -> str:
        """In one line, e.g. `qwen2, 1.54 billion parameters, tied embeddings, chat template`."""
        said = [
            printable(self.model_type),
            f"{in_words(self.sizes.parameters)} parameters",
            "tied embeddings" if self.tied else "untied embeddings",
            "chat template" if self.has_template else "no chat template",
        ]
        if self.experts:
            many = f"{self.experts} " if self.experts > 1 else ""
            said.append(f"mixture of {many}experts")
        return ", ".join(said)


def find_model(name: str, revision: str | None = None) -> FoundModel:
    """What can be told of a model without its weights. No code of the model is run.

    Args:
        name: Directory or hub id.
        revision: Its branch, tag or commit on the hub.

    Raises:
        UnsupportedModelError: There is no such model, or it is an adapter, quantised, or of a kind
            that transformers does not know.
    """
    base = adapter_base(name, revision)
    if base is not None:
        raise UnsupportedModelError(
            f"{name} is an adapter: name the model that it was trained on, {printable(base)}, and give the fine-tune to "
            "`safegene apply`."
        )
    model_type = _model_type(name, revision)
    skeleton = load_skeleton(name, revision)
    tokenizer = load_tokenizer(name, revision)
    modules = text_modules(skeleton)
    experts = _experts(modules)
    targets = _targets(modules, name, model_type, experts > 0)
    sizes = ModelSizes.of(skeleton, targets)
    return FoundModel(name, revision, model_type, skeleton, tokenizer, sizes, targets, experts)


def _model_type(name: str, revision: str | None) -> str:
    """The `model_type` of a model's config, which transformers knows."""
    check_readable(name, revision)
    file = stored_file(name, revision, "config.json")
    if file is None:
        raise _without_config(name)
    try:
        found = read_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(
            f"The config.json of {name} cannot be read: save or download the model again."
        ) from error
    kind = found.get("model_type") if isinstance(found, dict) else None
    if not (isinstance(kind, str) and kind):
        raise UnsupportedModelError(
            f"The config.json of {name} names no `model_type`: name a folder that `save_pretrained` wrote."
        )
    if kind not in CONFIG_MAPPING:
        own = "auto_map" in found
        raise UnsupportedModelError(
            f"The model type `{printable(kind)}` of {name} is not known to transformers {transformers_version}: "
            + (
                "it needs code of its own, which is never run, so "
                if own
                else "upgrade transformers, or "
            )
            + "name a model of a family that transformers itself has."
        )
    return kind


def _without_config(name: str) -> UnsupportedModelError:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors*")):
        return holds_no_model(folder)
    return UnsupportedModelError(
        f"{name} has no config.json: name the folder that `save_pretrained` wrote, or a hub id of a model."
    )


def _experts(modules: Mapping[str, nn.Module]) -> int:
    """How many experts a layer has; 1 where there are some and no number is told."""
    counts = [
        weights.count for module in modules.values() for weights in expert_weights(module).values()
    ]
    named = any(name.rpartition(".")[2] == "experts" for name in modules)
    return max(counts, default=int(named))


def _targets(
    modules: Mapping[str, nn.Module], name: str, model_type: str, is_mixture: bool
) -> list[str] | None:
    """The linear layers that a LoRA goes on, where `all-linear` would take in others: of a mixture
    its attention's, without routers; else all but those on which PEFT puts none. None where
    `all-linear` is right.
    """
    without = layers_without_lora(model_type)
    if not (is_mixture or without):
        return None
    found: dict[str, None] = {}
    for path in matrix_shapes(modules):
        parent, _, leaf = path.rpartition(".")
        around = parent.rpartition(".")[2]
        is_attention = "att" in around.lower() or leaf in _OF_ATTENTION
        is_meant = (is_attention and leaf not in _OF_EXPERTS) if is_mixture else True
        if is_meant and leaf not in without and can_be_changed(path) and not shared_parameter(path):
            found[leaf] = None
    if not found:
        raise UnsupportedModelError(
            f"{name} has no linear layers that a LoRA could be named for: write its recipe after one of `recipes/`, with "
            "`lora_target_modules` of your own."
        )
    return list(found)
