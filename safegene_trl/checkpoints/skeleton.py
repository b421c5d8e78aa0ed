"""Models without their weights: names, shapes and adapters of a finished checkpoint."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..errors import UnsupportedModelError
from ..models.parameters import tie_saved_modules
from ..models.supported import changes_base, check_method
from ..text import one_line
from .completeness import causal_architecture, empty_model, load_adapter, read_adapter_config
from .loading import UNREADABLE, not_loaded, read_config
from .source import adapter_base
from .tensor_file import StoredTensor


MOST_LAYERS = 2_000
_NOTHING = torch.zeros(8, dtype=torch.uint8)  # the bytes of one number of any type
# what a config of impossible sizes ends in, as no heads or a vocabulary of none
_IMPOSSIBLE = (ArithmeticError, LookupError, TypeError, StrictDataclassError)


def load_skeleton(
    name_or_path: str,
    revision: str | None = None,
    files: Mapping[str, StoredTensor] | None = None,
    quantised: bool = False,
) -> nn.Module:
    """The model without its weights; of an adapter only its own weights are read. `is_placeholder`
    tells which are missing.

    Args:
        name_or_path: Directory or hub id of a checkpoint or adapter.
        revision: Branch, tag or commit on the hub.
        files: The headers of the checkpoint's (or the base model's) tensors, where they must be the
            model's own.

    Raises:
        UnsupportedModelError: It cannot be loaded, or its checkpoint is quantised.
        CheckpointError: The files are not the model's.
    """
    base = adapter_base(name_or_path, revision)
    named = base or name_or_path
    try:
        config = read_config(named, None if base else revision)
        if getattr(config, "quantization_config", None):
            if not (quantised and _by_bitsandbytes(config)):
                raise UnsupportedModelError(
                    f"{named} is a quantised checkpoint: name the 16-bit model it was made from."
                )
            del config.quantization_config
        check_layers(config, named)
        if base is not None:
            _check_adapter(name_or_path, revision)
        model: Any = _without_storage(
            _empty(config) if files is None else empty_model(config, files, named)
        )
        if (Path(named) / GENERATION_CONFIG_NAME).is_file() or not Path(named).is_dir():
            with suppress(OSError):  # on the hub, a model without one
                kwargs: Any = {} if base or revision is None else {"revision": revision}
                model.generation_config = GenerationConfig.from_pretrained(named, **kwargs)
        if base is not None:
            model = load_adapter(model, name_or_path, revision, low_cpu_mem_usage=True)
            tie_saved_modules(model)
        return model.eval()
    except _IMPOSSIBLE as error:
        raise UnsupportedModelError(
            f"The config of {named} describes no model that can be made ({type(error).__name__}: {one_line(error)[:200]}): save or "
            "download it again."
        ) from error
    except UNREADABLE as error:
        raise not_loaded(f"The model {name_or_path}", named, error) from error


def check_layers(config: PreTrainedConfig, named: str) -> None:
    """Raises `UnsupportedModelError` for a config without layers, or with more than any model has,
    which would take minutes to be made and be none.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and not 1 <= layers <= MOST_LAYERS:
        raise UnsupportedModelError(
            f"The config of {named} has {layers:,} layers, and a model has 1 to {MOST_LAYERS:,}: save or download it again."
        )


def stores_quantised(named: str, revision: str | None = None) -> bool:
    """Whether the weights of a checkpoint, by its config, are quantised.

    Raises:
        UnsupportedModelError: The config cannot be read.
    """
    try:
        return bool(getattr(read_config(named, revision), "quantization_config", None))
    except UNREADABLE as error:
        raise not_loaded(f"The model {named}", named, error) from error


def _by_bitsandbytes(config: PreTrainedConfig) -> bool:
    by: Any = config.quantization_config
    method = by.get("quant_method") if isinstance(by, Mapping) else by.quant_method
    return str(getattr(method, "value", method)).startswith("bitsandbytes")


def _check_adapter(name_or_path: str, revision: str | None) -> None:
    """Raises `UnsupportedModelError` for an adapter that does not make its model from the base's
    files and its own.
    """
    adapter = read_adapter_config(name_or_path, revision)
    check_method(adapter)
    if changes_base(adapter):
        raise UnsupportedModelError(
            f"{name_or_path} is a LoRA with `init_lora_weights={adapter.init_lora_weights!r}`, which changed its base "
            "model's weights: it is merged only as a loaded model, by `safegene apply` without fixed coefficients or by PEFT's "
            "`merge_and_unload`; name what that saves."
        )


def _empty(config: PreTrainedConfig) -> nn.Module:
    architecture, config = causal_architecture(config)
    with torch.device("meta"):
        model: nn.Module = architecture._from_config(config, dtype=torch.float32)
    return model


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a skeleton has a shape only."""
    return tensor.data_ptr() == _NOTHING.data_ptr()


def _without_storage(model: nn.Module) -> nn.Module:
    """Puts the parameters of a model on the meta device on the CPU, all of them views of one
    number.

    PEFT moves an adapter to its layer's device, so an adapter on the meta device would lose its
    weights.
    """
    views: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            view = views.setdefault(
                id(tensor), nn.Parameter(_placeholder(tensor), requires_grad=False)
            )
            module.register_parameter(name, view)
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(
                name, _placeholder(buffer), name not in module._non_persistent_buffers_set
            )
    return model


def _placeholder(tensor: torch.Tensor) -> torch.Tensor:
    return _NOTHING.view(tensor.dtype)[0].expand(tensor.shape)
