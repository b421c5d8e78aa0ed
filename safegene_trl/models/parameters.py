"""A live model's weights under the names a checkpoint gives them, whatever wraps the modules (plain
or PEFT).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from ..distributed.shapes import full_shape
from ..errors import UnsupportedModelError


# FSDP's recomputation, `torch.compile`
_WRAPPERS = re.compile(r"\.(_checkpoint_wrapped_module|_orig_mod)(?=\.|$)")
# ways to start a LoRA that change the base's weights
_CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)


@dataclass(frozen=True)
class Parameter:
    """One tensor of the checkpoint to be: its checkpoint name, the live tensor, and the module that
    owns it.

    The live tensor may be a shard of the whole; `shape` is the whole's.
    """

    name: str
    tensor: torch.Tensor
    module_name: str
    module: nn.Module

    @property
    def shape(self) -> torch.Size:
        return full_shape(self.tensor)

    @property
    def is_weight(self) -> bool:
        """Whether it is its module's `weight`, to which low-rank deltas are added."""
        return self.name == f"{self.module_name}.weight"


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


def uncompiled(model: Any) -> Any:
    """The module inside what `torch.compile(module)` returns; any other module itself."""
    return model._modules.get("_orig_mod", model)


def canonical_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Maps checkpoint module names to live modules; for a layer with adapters, to the wrapper that
    adds them.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in base_model(model).named_modules():
        canonical = _canonical(name)
        outer = modules.get(canonical)
        if not _inside_adapter(name) and (outer is None or uncompiled(outer) is module):
            modules[canonical] = module
    return modules


def canonical_parameters(model: nn.Module) -> Iterator[Parameter]:
    """Yields what a full checkpoint of the model holds: parameters (tied ones once) and persistent
    buffers.
    """
    base = base_model(model)
    modules = canonical_modules(model)
    tied = set(getattr(base, "all_tied_weights_keys", None) or ())
    parameters = dict(base.named_parameters())
    buffers = {
        name: value
        for name, value in base.state_dict(keep_vars=True).items()
        if name not in parameters
    }
    seen: set[int] = {id(tensor) for tensor in parameters.values()}
    for name, tensor in (*parameters.items(), *buffers.items()):
        if _inside_adapter(name) or (name in buffers and (id(tensor) in seen or name in tied)):
            continue
        canonical = _canonical(name)
        module_name = canonical.rpartition(".")[0]
        yield Parameter(canonical, tensor, module_name, modules[module_name])


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

    Attributes:
        contents: Empty tensors by their names in the files.
        names: Of a live tensor that the files hold whole its name there; none of one that is fused
            in the model.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Parameter]):
        self._model = model
        marks = {
            parameter.name: torch.empty(
                parameter.shape, dtype=parameter.tensor.dtype, device="meta"
            )
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
    layer = _unadapted(module)
    if isinstance(layer, Conv1D):  # GPT-2's, stored as (d_in, d_out)
        return layer.weight.shape[1], layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight is stored as `(d_in, d_out)`."""
    return isinstance(_unadapted(module), Conv1D)


def task_factors(module: Any) -> list[TaskFactors]:
    """The task's own unmerged LoRA factors on a module."""
    if not isinstance(module, LoraLayer) or module.disable_adapters:
        return []
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


def check_supported(model: nn.Module) -> None:
    """Raises `UnsupportedModelError`, by name, for a fine-tune whose weights this version cannot
    merge exactly.
    """
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(base).__name__} is not a transformers model: train a `PreTrainedModel`."
        )
    for config in adapter_configs(model).values():
        check_method(config)
    if getattr(base, "is_quantized", False):
        raise UnsupportedModelError(
            "The base model is quantised and merging would requantise it: save the adapter, then run `safegene apply` "
            "on the 16-bit base model."
        )
    tied, modules = tied_weights(model), canonical_modules(model)
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            _check_saved_whole(name, module, modules, tied)
        elif isinstance(module, TrainableTokensWrapper):
            raise UnsupportedModelError(
                f"The fine-tune trains single tokens of `{name}`: leave out `trainable_token_indices`, or merge the adapter "
                "into the model first, then run `safegene apply`."
            )
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            _check_lora_untied(name, tied)
            _check_adapter(name, module)
    check_held(model)


def adapter_configs(model: Any) -> dict[str, Any]:
    """The PEFT config of every adapter on a model, by the adapter's name; empty for a model without
    adapters.
    """
    model = uncompiled(model)
    # by the model's own `add_adapter`
    of_transformers = getattr(model, "_hf_peft_config_loaded", False)
    return dict(model.peft_config) if isinstance(model, PeftModel) or of_transformers else {}


def check_method(adapter_config: Any) -> None:
    """Raises `UnsupportedModelError`, by its name, for any method of PEFT but LoRA."""
    method = adapter_config.peft_type
    if method == PeftType.LORA:
        return
    remedy = "train a LoRA in its place"
    if not adapter_config.is_prompt_learning:  # which acts beside the weights
        remedy += ", or merge it into the model first (`merge_and_unload`)"
    raise UnsupportedModelError(
        f"The fine-tune uses PEFT's {getattr(method, 'value', method)}, and only LoRA can be merged: {remedy}."
    )


def check_held(model: nn.Module) -> None:
    """Raises `UnsupportedModelError` unless the fine-tune is its adapter as PEFT saves it, and that
    beside the weights.

    Both can change while a model is trained, so this is asked before the first step and after the
    last.
    """
    base, configs = base_model(model), adapter_configs(model)
    of_base = {id(tensor) for tensor in base.parameters()}
    for name, tensor in uncompiled(model).named_parameters():
        if tensor.requires_grad and id(tensor) not in of_base:
            raise UnsupportedModelError(
                f"The fine-tune trains `{name}`, which is no part of the model that is saved: freeze it."
            )
    for name, module in base.named_modules():
        # PEFT takes a merged adapter out of the weights as soon as it is switched off, whatever
        # they hold by then
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise UnsupportedModelError(
                f"The adapter on `{_canonical(name)}` is merged into the weights: call `unmerge_adapter()` on the model."
            )
    biases = {getattr(config, "bias", "none") for config in configs.values()}
    for name, tensor in base.named_parameters() if configs else ():
        saved = _inside_adapter(name) or ".modules_to_save." in name
        saved |= ("all" in biases and "bias" in name) or (
            "lora_only" in biases and name.endswith(".base_layer.bias")
        )
        if tensor.requires_grad and not saved:
            raise UnsupportedModelError(
                f"The fine-tune trains `{_canonical(name)}` beside its LoRA, and PEFT does not save that: name its module "
                "in the LoRA's `modules_to_save`, or freeze it."
            )


def check_adapter_output(model: nn.Module) -> None:
    """Raises `UnsupportedModelError` for a fine-tune that no LoRA on its named base model can
    express.
    """
    configs = list(adapter_configs(model).values())
    if whole := _trained_whole(model, configs):
        raise UnsupportedModelError(
            f"The fine-tune trains `{whole}` itself, which no low-rank delta can hold: set `output.output_format: merged`."
        )
    for config in configs:
        kind = (
            f"LoRA with `init_lora_weights={config.init_lora_weights!r}`"
            if changes_base(config)
            else None
        )
        if getattr(config, "use_dora", False):
            kind = "DoRA"
        if kind:
            raise UnsupportedModelError(
                f"The fine-tune uses {kind}, which is no low-rank delta on its base model: set `output.output_format: merged`."
            )


def _trained_whole(model: nn.Module, configs: Iterable[Any]) -> str | None:
    """The first module or bias that adapters of these configs hold in the place of the base
    model's, None without any.
    """
    biases = {getattr(config, "bias", "none") for config in configs}
    for name, module in base_model(model).named_modules() if biases else ():
        if isinstance(module, ModulesToSaveWrapper):
            return _canonical(name)
        trained = "all" in biases or ("lora_only" in biases and isinstance(module, LoraLayer))
        if (
            trained
            and not _inside_adapter(name)
            and getattr(_unadapted(module), "bias", None) is not None
        ):
            return f"{_canonical(name)}.bias"
    return None


def changes_base(adapter_config: Any) -> bool:
    """Whether an adapter of this PEFT config was started by changing the weights of its base model,
    as PiSSA is.
    """
    return str(getattr(adapter_config, "init_lora_weights", "")).startswith(_CHANGES_BASE)


def tied_weights(model: nn.Module) -> dict[str, set[str]]:
    """Parameters that are one tensor under several names, as input and output embeddings can be.

    Returns:
        For each of them, by its checkpoint name, the names of all that are the same.
    """
    base = base_model(model)
    names: dict[int, set[str]] = {}
    for name, tensor in base.named_parameters(remove_duplicate=False):
        if not any(part.startswith(("lora_", "modules_to_save")) for part in name.split(".")):
            names.setdefault(id(tensor), set()).add(
                _canonical(name.replace(".original_module", ""))
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


def check_untied(model: nn.Module, modules: Iterable[str]) -> None:
    """Raises `UnsupportedModelError` if a delta is for a module whose weight other modules have as
    well.
    """
    tied = tied_weights(model)
    for name in modules:
        if others := tied.get(f"{name}.weight", set()) - {f"{name}.weight"}:
            raise UnsupportedModelError(
                f"The safety vector changes `{name}`, whose weight the model shares with `{min(others)}`: use a vector "
                "without that module."
            )


def tie_saved_modules(model: Any) -> None:
    """Makes copies that `modules_to_save` holds of one tied weight one tensor again, where PEFT was
    told to tie them.

    Loading gives each a tensor of its own; where their values differ they stay apart.
    """
    if not any(
        getattr(config, "ensure_weight_tying", False) for config in model.peft_config.values()
    ):
        return
    modules = canonical_modules(model)
    for name, group in tied_weights(model).items():
        module_name, _, leaf = name.rpartition(".")
        first_name, _, first_leaf = min(group).rpartition(".")
        saved, first = _saved(modules[module_name]), _saved(modules[first_name])
        if saved is not None and first is not None and saved is not first:
            own, other = getattr(saved, leaf), getattr(first, first_leaf)
            if own.shape == other.shape and torch.equal(own, other):
                setattr(saved, leaf, other)


def _saved(module: nn.Module) -> Any:
    """The active copy of a module in `modules_to_save`, None where there is none."""
    if not isinstance(module, ModulesToSaveWrapper) or not module.active_adapters:
        return None
    return module.modules_to_save[module.active_adapters[0]]


def _check_saved_whole(
    name: str, wrapper: Any, modules: Mapping[str, nn.Module], tied: Mapping[str, set[str]]
) -> None:
    if len(wrapper.modules_to_save) > 1 or _saved(wrapper) is None:
        raise UnsupportedModelError(
            f"`{name}` is saved whole by several adapters, or by one that is not active: load one adapter and activate it."
        )
    for parameter, tensor in _saved(wrapper).named_parameters():
        for other in tied.get(f"{_canonical(name)}.{parameter}", ()):
            module_name, _, leaf = other.rpartition(".")
            copy = _saved(modules[module_name])
            if copy is None or getattr(copy, leaf) is not tensor:
                raise UnsupportedModelError(
                    f"The fine-tune saves its own `{name}`, whose weight the model ties to `{module_name}`: train with "
                    "`ensure_weight_tying=True`, or take it out of `modules_to_save`."
                )


def _check_lora_untied(name: str, tied: Mapping[str, set[str]]) -> None:
    weight = f"{_canonical(name)}.weight"
    if others := tied.get(weight, set()) - {weight}:
        raise UnsupportedModelError(
            f"The fine-tune has a LoRA on `{name}`, whose weight the model shares with `{min(others)}`: no merged checkpoint "
            "can hold both, so take it out of `target_modules`."
        )


def _check_adapter(name: str, module: Any) -> None:
    if not isinstance(module, LoraLayer) or linear_shape(module) is None:  # type: ignore[arg-type]
        raise UnsupportedModelError(
            f"`{name}` is adapted by {type(module).__name__} and only LoRA on linear layers can be merged: merge this "
            "adapter into the model first, then run `safegene apply`."
        )
    other = {
        name: variant
        for name, variant in module.lora_variant.items()
        if name not in module.lora_magnitude_vector
    }
    if other:
        variants = ", ".join(sorted({type(variant).__name__ for variant in other.values()}))
        raise UnsupportedModelError(
            f"The fine-tune uses a LoRA variant ({variants}) that is no plain low-rank delta: merge the adapter into the "
            "model first, then run `safegene apply`."
        )
    if module.lora_variant and (len(module.active_adapters) > 1 or is_transposed(module)):  # type: ignore[arg-type]
        raise UnsupportedModelError(
            "DoRA is merged only where it is the one active adapter, on `nn.Linear` layers: merge the adapters into the "
            "model first, then run `safegene apply`."
        )
    if any(b.bias is not None for b in module.lora_B.values()):
        raise UnsupportedModelError(
            "The fine-tune's LoRA has a bias: train it with `lora_bias=False`."
        )


def _unadapted(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _canonical(name: str) -> str:
    name = _WRAPPERS.sub("", re.sub(r"\.modules_to_save\.[^.]+", "", name))
    return name.replace(".base_layer", "")


def _inside_adapter(name: str) -> bool:
    parts = name.split(".")
    return any(part.startswith(("lora_", "original_module")) for part in parts)
