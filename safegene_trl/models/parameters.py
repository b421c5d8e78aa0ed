"""A live model's weights under the names a checkpoint gives them, whatever wraps the modules (plain
or PEFT).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from ..distributed.shapes import full_shape
from .names import text_names, without_wrapper
from .quantized import is_quantized, is_transposed_in_files, weight_shape


# FSDP's recomputation, `torch.compile`
_WRAPPERS = re.compile(r"\.(_checkpoint_wrapped_module|_orig_mod)(?=\.|$)")


@dataclass(frozen=True)
class Parameter:
    """One tensor of the checkpoint to be: the model's own name for it, the live tensor, and the
    module that owns it, under its canonical name.

    The live tensor may be a shard of the whole, or packed by quantisation; `shape` is the whole's.
    """

    name: str
    tensor: torch.Tensor
    module_name: str
    module: nn.Module

    @property
    def shape(self) -> torch.Size:
        layer = unadapted(self.module)
        if self.is_weight and is_quantized(layer):
            return weight_shape(layer)
        return full_shape(self.tensor)

    @property
    def canonical(self) -> str:
        """Its canonical name, as its module's."""
        return f"{self.module_name}.{self.name.rpartition('.')[2]}"

    @property
    def is_weight(self) -> bool:
        """Whether it is its module's `weight`, to which low-rank deltas are added."""
        return self.name.rpartition(".")[2] == "weight"


@dataclass(frozen=True)
class TaskFactors:
    """One LoRA of the task on one module: the live `a` (r×d_in) and `b` (d_out×r), maybe shards,
    and its scaling.

    With DoRA (arXiv 2402.09353) `dora` (d_out) is the norm that every row of the sum is scaled to.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dora: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """The live tensors."""
        return [self.a, self.b] if self.dora is None else [self.a, self.b, self.dora]

    def of(self, tensors: Iterator[torch.Tensor]) -> "TaskFactors":
        """The same LoRA with the next of `tensors` in the place of its own."""
        return TaskFactors(
            next(tensors), next(tensors), self.scaling, None if self.dora is None else next(tensors)
        )

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(A, B)` in float32 with the scaling folded into B."""
        return self.a.detach().float(), self.b.detach().float() * self.scaling

    @property
    def magnitude(self) -> torch.Tensor | None:
        """DoRA's row norms in float32."""
        return None if self.dora is None else self.dora.detach().float()


def base_model(model: Any) -> Any:
    """The transformers model inside a possibly PEFT-wrapped or compiled one."""
    model = uncompiled(model)
    return uncompiled(model.get_base_model()) if isinstance(model, PeftModel) else model


def context_length(model: Any) -> int | None:
    """How many tokens a model's context holds by its config, None if it has no limit."""
    found: int | None = getattr(
        base_model(model).config.get_text_config(), "max_position_embeddings", None
    )
    return found


def uncompiled(model: Any) -> Any:
    """The module inside what `torch.compile(module)` returns; any other module itself."""
    return model._modules.get("_orig_mod", model)


def canonical_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Maps canonical module names to live modules: the model's own names, but that a text model has
    the same in a class of text and images as outside of it. For a layer with adapters, to the
    wrapper that adds them.
    """
    modules = own_modules(model)
    return {name: modules[own] for name, own in _own_names(modules).items()}


def text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The same of the text model alone: without vision towers and what joins them to it."""
    modules = own_modules(model)
    text = set(text_names(modules))
    return {name: modules[own] for name, own in _own_names(modules).items() if own in text}


def own_names(model: nn.Module) -> dict[str, str]:
    """By canonical module name the model's own, without what adapters and compilation put into
    it.
    """
    return _own_names(own_modules(model))


def _own_names(names: Iterable[str]) -> dict[str, str]:
    # the text model comes first where the class around it has a module of the same name
    inside: dict[str, str] = {}
    found: dict[str, str] = {}
    for name in names:
        canonical = without_wrapper(name)
        (found if canonical == name else inside)[canonical] = name
    return found | inside


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Maps a model's own module names to live modules; for a layer with adapters, to the wrapper
    that adds them.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in base_model(model).named_modules():
        canonical = canonical_name(name)
        outer = modules.get(canonical)
        if not inside_adapter(name) and (outer is None or uncompiled(outer) is module):
            modules[canonical] = module
    return modules


def vocabulary_rows(model: nn.Module) -> int:
    """Rows of the input embedding, which can be more than the tokenizer has tokens."""
    embedding: Any = base_model(model).get_input_embeddings()
    return full_shape(embedding.weight)[0]


def canonical_parameters(model: nn.Module) -> Iterator[Parameter]:
    """Yields what a full checkpoint of the model holds: parameters (tied ones once) and persistent
    buffers.
    """
    base = base_model(model)
    modules = own_modules(model)
    tied = set(getattr(base, "all_tied_weights_keys", None) or ())
    parameters = dict(base.named_parameters())
    packed = tuple(f"{name}." for name, module in base.named_modules() if is_quantized(module))
    buffers = {
        name: value
        for name, value in base.state_dict(keep_vars=True).items()
        # a quantised layer's statistics belong to no checkpoint but a quantised one
        if name not in parameters and not name.startswith(packed)
    }
    seen: set[int] = {id(tensor) for tensor in parameters.values()}
    for name, tensor in (*parameters.items(), *buffers.items()):
        if inside_adapter(name) or (name in buffers and (id(tensor) in seen or name in tied)):
            continue
        canonical = canonical_name(name)
        module_name = canonical.rpartition(".")[0]
        yield Parameter(canonical, tensor, without_wrapper(module_name), modules[module_name])


def text_parameters(model: nn.Module) -> list[Parameter]:
    """Those of the text model alone."""
    parameters = {parameter.name: parameter for parameter in canonical_parameters(model)}
    return [parameters[name] for name in text_names(parameters)]


def as_stored(model: nn.Module, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What checkpoint files hold of one live tensor: as a rule itself, of some models another name
    or several pieces.

    transformers fuses the experts of a mixture-of-experts model when it loads them, and renames
    modules.
    """
    return revert_weight_conversion(base_model(model), {name: tensor})


class StoredForm:
    """How checkpoint files hold the tensors of a live model; it is looked through once for all that
    they hold whole.

    Args:
        model: The live model.
        parameters: All of its tensors.
        dtype_of: In which data type each is written.

    Attributes:
        contents: Empty tensors by their names in the files.
        names: Of a live tensor that the files hold whole its name there; none of one that is fused
            in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[Parameter],
        dtype_of: Callable[[Parameter], torch.dtype],
    ):
        self._model = model
        marks = {
            parameter.name: torch.empty(parameter.shape, dtype=dtype_of(parameter), device="meta")
            for parameter in parameters
        }
        self.contents = revert_weight_conversion(base_model(model), dict(marks))
        live = {id(mark): name for name, mark in marks.items()}
        # what is only renamed is the very tensor that was given
        self.names = {
            live[id(piece)]: name for name, piece in self.contents.items() if id(piece) in live
        }

    def of(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `as_stored`."""
        if name in self.names:
            return {self.names[name]: tensor}
        return as_stored(self._model, name, tensor)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(d_out, d_in)` of a linear layer (with or without LoRA around it), None for any other
    module.
    """
    layer = unadapted(module)
    if isinstance(layer, Conv1D):  # GPT-2's, stored as (d_in, d_out)
        return layer.weight.shape[1], layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight is stored as `(d_in, d_out)`: one-hot tokens enter embeddings."""
    layer = unadapted(module)
    if isinstance(layer, Conv1D | nn.Embedding):
        return True
    return is_quantized(layer) and is_transposed_in_files(layer)


def task_factors(module: Any) -> list[TaskFactors]:
    """The task's own unmerged LoRA factors on a module's weight."""
    if not isinstance(module, LoraLayer) or module.disable_adapters:
        return []
    if isinstance(module, ParamWrapper):  # they are on other parameters than `weight`
        return []
    if isinstance(module, Embedding):
        return [
            TaskFactors(
                module.lora_embedding_A[name],
                module.lora_embedding_B[name],
                float(module.scaling[name]),
            )
            for name in module.active_adapters
            if name in module.lora_embedding_A and name not in module.merged_adapters
        ]
    lora_a: Any = module.lora_A
    lora_b: Any = module.lora_B
    magnitudes: Any = module.lora_magnitude_vector
    return [
        TaskFactors(
            lora_a[name].weight,
            lora_b[name].weight,
            float(module.scaling[name]),
            magnitudes[name].weight if name in magnitudes else None,
        )
        for name in module.active_adapters
        if name in lora_a and name not in module.merged_adapters
    ]


def adapter_configs(model: Any) -> dict[str, Any]:
    """The PEFT config of every adapter on a model, by the adapter's name; empty for a model without
    adapters.
    """
    model = uncompiled(model)
    # by the model's own `add_adapter`
    of_transformers = getattr(model, "_hf_peft_config_loaded", False)
    return dict(model.peft_config) if isinstance(model, PeftModel) or of_transformers else {}


def tied_weights(model: nn.Module) -> dict[str, set[str]]:
    """Parameters that are one tensor under several names, as input and output embeddings can be.

    Returns:
        For each of them, by its checkpoint name, the names of all that are the same.
    """
    base = base_model(model)
    names: dict[int, set[str]] = {}
    for name, tensor in base.named_parameters(remove_duplicate=False):
        adapters = ("lora_", "modules_to_save", "trainable_tokens_")
        if not any(part.startswith(adapters) for part in name.split(".")):
            names.setdefault(id(tensor), set()).add(
                canonical_name(name.replace(".original_module", ""))
            )
    # Where a model is sharded, the parts of one tensor may be objects of their own: transformers'
    # record counts as well.
    groups = [*names.values()]
    groups += [
        {target, source}
        for target, source in (getattr(base, "all_tied_weights_keys", None) or {}).items()
    ]
    found: dict[str, set[str]] = {}
    for group in groups:
        if len(group) > 1:
            whole = group.union(*(found[name] for name in group if name in found))
            found |= dict.fromkeys(whole, whole)
    return found


def tie_saved_modules(model: Any) -> None:
    """Makes copies that `modules_to_save` holds of one tied weight one tensor again, where PEFT was
    told to tie them.

    Loading gives each a tensor of its own; where their values differ they stay apart.
    """
    if not any(
        getattr(config, "ensure_weight_tying", False) for config in model.peft_config.values()
    ):
        return
    modules = own_modules(model)
    for name, group in tied_weights(model).items():
        module_name, _, leaf = name.rpartition(".")
        first_name, _, first_leaf = min(group).rpartition(".")
        saved, first = saved_copy(modules[module_name]), saved_copy(modules[first_name])
        if saved is not None and first is not None and saved is not first:
            own, other = getattr(saved, leaf), getattr(first, first_leaf)
            if own.shape == other.shape and torch.equal(own, other):
                setattr(saved, leaf, other)


def saved_copy(module: nn.Module) -> Any:
    """The active copy of a module in `modules_to_save`, None where there is none."""
    if not isinstance(module, ModulesToSaveWrapper) or not module.active_adapters:
        return None
    return module.modules_to_save[module.active_adapters[0]]


def unadapted(module: Any) -> Any:
    """The layer inside one with adapters, or with trained tokens, or that an adapter saves whole;
    any other module itself.
    """
    if (copy := saved_copy(module)) is not None:
        return copy
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


@dataclass(frozen=True)
class TrainedRows:
    """Rows of an embedding matrix that a fine-tune trained by PEFT's `trainable_token_indices`.

    Attributes:
        indices: Which rows: int64.
        values: What stands there, rows×columns; the live tensor, maybe a shard.
    """

    indices: torch.Tensor
    values: torch.Tensor


def trained_rows(module: Any) -> list[TrainedRows]:
    """What the active adapters hold in the place of single rows of a module's weight."""
    if not isinstance(module, TrainableTokensWrapper) or module.token_adapter.disable_adapters:
        return []
    layer: Any = module.token_adapter
    return [
        TrainedRows(torch.tensor(layer.token_indices[name]), layer.trainable_tokens_delta[name])
        for name in layer.active_adapters
        if name in layer.trainable_tokens_delta and name not in layer.merged_adapters
    ]


def canonical_name(name: str) -> str:
    """The checkpoint name of a live module or parameter."""
    name = _WRAPPERS.sub("", re.sub(r"\.modules_to_save\.[^.]+", "", name))
    return name.replace(".token_adapter", "").replace(".base_layer", "")


def inside_adapter(name: str) -> bool:
    """Whether this is the live name of a part of an adapter, or of what an adapter replaces."""
    parts = name.split(".")
    return any(part.startswith(("lora_", "original_module", "trainable_tokens_")) for part in parts)
