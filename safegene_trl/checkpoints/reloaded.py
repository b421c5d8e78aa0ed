"""A live model as somebody will have it who loads its checkpoint: its tensors in a model made from
the config alone.

A hook on a layer, a module of somebody's own, a setting changed after loading: a live model may
compute with what no checkpoint holds. Then what was measured on it is not what the checkpoint
answers.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..distributed.layouts import Sharding
from ..errors import UnsupportedModelError
from ..models.data_types import WrittenTypes, name_of
from ..models.parameters import (
    base_model,
    canonical_parameters,
    own_modules,
    unadapted,
)
from ..models.quantized import is_quantized
from .completeness import causal_architecture
from .tensor_file import commonest_dtype


def can_reload(model: nn.Module, sharding: Sharding) -> bool:
    """Whether `reloaded` works: on whole weights that lie on one device."""
    devices = {tensor.device for tensor in model.parameters()}
    return not sharding.collective_forward and len(devices) == 1


def reloaded(model: nn.Module, config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `from_pretrained` makes of a config, in eval mode, on the live
    tensors.

    Adapters and hooks of the live model are not in it. Quantised layers are the live ones. What is
    of another data type than most of the weights is cast to theirs, as by loading: only the autocast
    of a training computes with both.

    Args:
        model: The live model, plain or PEFT-wrapped, on one device.
        config: Of the checkpoint; changed by the making.

    Raises:
        UnsupportedModelError: The config makes a model with other tensors.
    """
    live = base_model(model)
    config.__dict__.pop("quantization_config", None)
    config._attn_implementation = live.config._attn_implementation
    config._experts_implementation = live.config._experts_implementation
    parameters = list(canonical_parameters(model))
    dtype = commonest_dtype({each.name: (each.tensor.dtype, each.shape) for each in parameters})
    types = WrittenTypes.of_model(model, name_of(dtype))
    with no_init_weights(), init_empty_weights(include_buffers=False):
        fresh: PreTrainedModel = _architecture(live, config)._from_config(config, dtype=dtype)
    for name, module in own_modules(model).items():
        if is_quantized(layer := unadapted(module)):
            fresh.set_submodule(name, layer)
    for parameter in parameters:
        if not is_quantized(unadapted(parameter.module)):
            _put(fresh, parameter.name, parameter.tensor.detach().to(types.of(parameter)))
    fresh.tie_weights()
    missing = [name for name, tensor in fresh.named_parameters() if tensor.is_meta]
    if missing:
        raise UnsupportedModelError(
            f"A model made from the fine-tune's config has a tensor {missing[0]}, which the fine-tune lacks: change the "
            "model by its config, not after it was made."
        )
    for module in fresh.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(live.device)
    return fresh.eval()


def _architecture(live: PreTrainedModel, config: PreTrainedConfig) -> Any:
    """The class that loads the checkpoint: a class of somebody's own is not found by those who load
    it.
    """
    own = next(kind for kind in type(live).__mro__ if issubclass(kind, PreTrainedModel))
    if (
        own.__module__.startswith("transformers.")
        or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return own
    architecture, _ = causal_architecture(config)
    return architecture


def _put(fresh: nn.Module, name: str, tensor: torch.Tensor) -> None:
    place, _, leaf = name.rpartition(".")
    try:
        module = fresh.get_submodule(place)
        there = getattr(module, leaf)
    except AttributeError:
        there = None
    if there is None or there.shape != tensor.shape:
        raise UnsupportedModelError(
            f"The fine-tune has a tensor {name} that a model made from its config lacks: change the model by its config, not "
            "after it was made."
        )
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
