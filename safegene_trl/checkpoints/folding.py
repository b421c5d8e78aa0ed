"""A loaded model with its LoRA in its weights, for whoever needs the adapter no more.

With a LoRA beside the weights every layer takes two more small products for every decoded token,
which a GPU waits for.
"""

from contextlib import ExitStack

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..distributed.layouts import Sharding
from ..errors import UnsupportedModelError
from ..models.experts import factors_on
from ..models.parameters import base_model, canonical_parameters
from ..models.supported import check_supported
from .live_merge import merged_tensor
from .merge_terms import NO_VECTOR


@torch.no_grad()
def fold_adapters(model: nn.Module, sharding: Sharding) -> bool:
    """Folds the model's LoRA into its weights, for good, and switches it off; whether it did.

    The weights are those of a merged checkpoint: added in float32, rounded to their data type. What
    no merge can hold exactly, a quantised model and one that is shared out over ranks stay as they
    are.

    Args:
        model: A loaded model, plain or PEFT-wrapped.
        sharding: How it is spread over ranks.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    quantised = getattr(base_model(model), "is_quantized", False)
    if not layers or quantised or sharding.collective_forward:
        return False
    try:
        check_supported(model)
    except UnsupportedModelError:  # of a merge: beside the weights PEFT runs it
        return False
    for parameter in list(canonical_parameters(model)):
        if factors_on(parameter):
            with ExitStack() as undo:
                sharding.overwrite(
                    parameter.tensor, merged_tensor(parameter, NO_VECTOR, sharding), undo
                )
                undo.pop_all()  # there is no way back, whose weights would take memory
    for layer in layers:
        layer.enable_adapters(False)
    return True
