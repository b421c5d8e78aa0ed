"""Which fine-tunes this version can merge exactly; every other one is refused by its name."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from peft import PeftType
from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .experts import expert_weights, stored_pieces
from .names import shared_parameter, without_wrapper
from .parameters import (
    adapter_configs,
    base_model,
    canonical_name,
    canonical_parameters,
    inside_adapter,
    is_transposed,
    linear_shape,
    own_modules,
    own_names,
    saved_copy,
    tied_weights,
    unadapted,
    uncompiled,
)
from .quantized import is_quantized


# ways to start a LoRA that change the base's weights
_CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)

# types of models on whose state-space layers PEFT puts no LoRA, and how it knows the layers
_WITHOUT_LORA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_LAYERS_WITHOUT_LORA = ("out_proj", "conv1d")

_OTHER_QUANTIZATION = (
    "The base model is quantised by {by}, and only a base that bitsandbytes has quantised is supported in place: load it so "
    "(`BitsAndBytesConfig`), or save the adapter, name its 16-bit base in `adapter_config.json` and run `safegene apply` on it."
)


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
    _check_quantization(model)
    tied, modules = tied_weights(model), own_modules(model)
    lora_on_experts = set()
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            _check_saved_whole(name, module, modules, tied)
        elif isinstance(module, TrainableTokensWrapper):
            _check_tokens(name, module, modules, tied)
        elif isinstance(module, ParamWrapper):
            _check_experts(name, module)
            parameter = f"{canonical_name(name)}.{module.parameter_name}"
            lora_on_experts.add(without_wrapper(parameter))
        elif isinstance(module, TrainableTokensLayer):
            continue  # of the wrapper around it
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            _check_lora_untied(name, tied)
            _check_adapter(name, module)
    _check_stored(model, lora_on_experts)
    check_held(model)


def _check_quantization(model: nn.Module) -> None:
    """Raises `UnsupportedModelError`, by its name, for any quantised base but one of bitsandbytes'
    under a LoRA.
    """
    base = base_model(model)
    by = getattr(base, "quantization_method", None)
    by = None if by is None else str(getattr(by, "value", by))
    layers = [name for name, module in base.named_modules() if is_quantized(module)]
    if by not in (None, "bitsandbytes") or (getattr(base, "is_quantized", False) and not layers):
        raise UnsupportedModelError(_OTHER_QUANTIZATION.format(by=by or "another library"))
    for name, tensor in base.named_parameters():
        if name.removesuffix(".weight") in layers:
            continue
        if type(tensor.data).__module__.startswith("torchao"):
            raise UnsupportedModelError(_OTHER_QUANTIZATION.format(by="torchao"))
        if tensor.itemsize == 1 or not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"`{canonical_name(name)}` holds quantised numbers ({kind}), and only linear layers that bitsandbytes has "
                "quantised are supported in place: train on the 16-bit base model."
            )
    if not layers:
        return
    configs = adapter_configs(model).values()
    if not configs:
        raise UnsupportedModelError(
            "The base model is quantised by bitsandbytes and the fine-tune has no LoRA: train one, by PEFT."
        )
    if changed := next((config for config in configs if changes_base(config)), None):
        raise UnsupportedModelError(
            f"The fine-tune uses LoRA with `init_lora_weights={changed.init_lora_weights!r}` on a quantised base, whose weights "
            "that changes, so that it belongs to no 16-bit base: train it with `init_lora_weights=True`."
        )


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
                f"The adapter on `{canonical_name(name)}` is merged into the weights: call `unmerge_adapter()` on the model."
            )
        if isinstance(module, LoraLayer):
            _check_scaling(canonical_name(name), module, configs)
    biases = {getattr(config, "bias", "none") for config in configs.values()}
    for name, tensor in base.named_parameters() if configs else ():
        saved = inside_adapter(name) or ".modules_to_save." in name
        saved |= ("all" in biases and "bias" in name) or (
            "lora_only" in biases and name.endswith(".base_layer.bias")
        )
        if tensor.requires_grad and not saved:
            raise UnsupportedModelError(
                f"The fine-tune trains `{canonical_name(name)}` beside its LoRA, and PEFT does not save that: name its module "
                "in the LoRA's `modules_to_save`, or freeze it."
            )


def _check_scaling(name: str, module: LoraLayer, configs: Mapping[str, Any]) -> None:
    """Raises `UnsupportedModelError` where a layer's adapter does not act as strongly as it will when it
    is loaded again, because PEFT stores alpha and rank alone.
    """
    for adapter in module.active_adapters:
        if adapter not in module.scaling or adapter not in configs:
            continue
        rank = module.r[adapter]
        stored = module.lora_alpha[adapter] / (
            math.sqrt(rank) if configs[adapter].use_rslora else rank
        )
        if not math.isclose(module.scaling[adapter], stored, rel_tol=1e-6):
            raise UnsupportedModelError(
                f"The LoRA `{adapter}` on `{name}` acts with a scaling of {module.scaling[adapter]:g}, and PEFT saves it with {stored:g}: "
                "call `unscale_layer()` on its layers, or change its `lora_alpha`."
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
    for name, module in base_model(model).named_modules() if configs else ():
        if isinstance(module, (ParamWrapper, Embedding)):
            raise UnsupportedModelError(
                f"The fine-tune has a LoRA on `{canonical_name(name)}`, which is no linear layer: set `output.output_format: "
                "merged`."
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
        if isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            return canonical_name(name)
        trained = "all" in biases or ("lora_only" in biases and isinstance(module, LoraLayer))
        if (
            trained
            and not inside_adapter(name)
            and getattr(unadapted(module), "bias", None) is not None
        ):
            return f"{canonical_name(name)}.bias"
    return None


def check_answers(model: nn.Module) -> None:
    """Raises `UnsupportedModelError` for a loaded model that would fail in its second pass: PEFT's
    DoRA takes the scales of an 8-bit layer away, where that is on a CPU.
    """
    for module in model.modules():
        if not (isinstance(module, LoraLayer) and module.lora_magnitude_vector):
            continue
        layer: Any = unadapted(module)
        if is_quantized(layer) and layer.weight.dtype == torch.int8 and not layer.weight.is_cuda:
            raise UnsupportedModelError(
                "The fine-tune is a DoRA on an 8-bit base, which PEFT runs on a GPU only: take one, or name the 16-bit base in "
                "`adapter_config.json`."
            )


def changes_base(adapter_config: Any) -> bool:
    """Whether an adapter of this PEFT config was started by changing the weights of its base model,
    as PiSSA is.
    """
    return str(getattr(adapter_config, "init_lora_weights", "")).startswith(_CHANGES_BASE)


def check_untied(model: nn.Module, modules: Iterable[str]) -> None:
    """Raises `UnsupportedModelError` if a delta is for a module whose weight other modules have as
    well.
    """
    tied, own = tied_weights(model), own_names(model)
    for name in modules:
        weight = f"{own.get(name, name)}.weight"
        if others := tied.get(weight, set()) - {weight}:
            raise UnsupportedModelError(
                f"The safety vector changes `{name}`, whose weight the model shares with `{min(others)}`: use a vector "
                "without that module."
            )


def check_experts(model: nn.Module, matrices: Iterable[str], merged: bool) -> None:
    """Raises `UnsupportedModelError` if a delta is for experts that cannot be written with it.

    Args:
        model: The fine-tune.
        matrices: What the deltas are for.
        merged: Whether a full checkpoint alone is written.
    """
    parameters = {parameter for name in matrices if (parameter := shared_parameter(name))}
    if parameters and not merged:
        raise UnsupportedModelError(
            f"The safety vector changes the experts in `{min(parameters)}`, which an adapter of linear layers cannot hold: set "
            "`output.output_format: merged`."
        )
    _check_stored(model, parameters)


def layers_without_lora(model_type: str | None) -> tuple[str, ...]:
    """The last parts of the names of layers on which PEFT puts no LoRA in a model of a type."""
    return _LAYERS_WITHOUT_LORA if model_type in _WITHOUT_LORA else ()


def check_adapter_layers(model: nn.Module, modules: Iterable[str]) -> None:
    """Raises `UnsupportedModelError` if a delta is for a module on which PEFT loads no LoRA.

    Args:
        model: The fine-tune.
        modules: What the deltas are for, by canonical module names.
    """
    config: Any = base_model(model).config
    without = layers_without_lora(getattr(config, "model_type", None))
    for name in modules:
        if name.rpartition(".")[2] in without:
            raise UnsupportedModelError(
                f"The safety vector changes `{name}`, on which PEFT loads no LoRA in a model of the type {config.model_type}: "
                "set `output.output_format: merged`."
            )


def _check_stored(model: nn.Module, parameters: Collection[str]) -> None:
    """Of parameters that hold experts, by their canonical names."""
    for parameter in canonical_parameters(model) if parameters else ():
        if parameter.canonical in parameters and stored_pieces(model, parameter) is None:
            raise UnsupportedModelError(
                f"Checkpoint files hold the experts in `{parameter.name}` in a form that cannot be read back: use a vector, "
                "and a fine-tune, that leaves them out."
            )


def _check_saved_whole(
    name: str, wrapper: Any, modules: Mapping[str, nn.Module], tied: Mapping[str, set[str]]
) -> None:
    if len(wrapper.modules_to_save) > 1 or saved_copy(wrapper) is None:
        raise UnsupportedModelError(
            f"`{name}` is saved whole by several adapters, or by one that is not active: load one adapter and activate it."
        )
    for parameter, tensor in saved_copy(wrapper).named_parameters():
        for other in tied.get(f"{canonical_name(name)}.{parameter}", ()):
            module_name, _, leaf = other.rpartition(".")
            copy = saved_copy(modules[module_name])
            if copy is None or getattr(copy, leaf) is not tensor:
                raise UnsupportedModelError(
                    f"The fine-tune saves its own `{name}`, whose weight the model ties to `{module_name}`: train with "
                    "`ensure_weight_tying=True`, or take it out of `modules_to_save`."
                )


def _check_tokens(
    name: str, wrapper: Any, modules: Mapping[str, nn.Module], tied: Mapping[str, set[str]]
) -> None:
    own = f"{canonical_name(name)}.weight"
    for other in tied.get(own, set()) - {own}:
        module_name = other.rpartition(".")[0]
        twin: Any = modules[module_name]
        if not isinstance(twin, TrainableTokensWrapper) or (
            twin.token_adapter.trainable_tokens_delta
            is not wrapper.token_adapter.trainable_tokens_delta
        ):
            raise UnsupportedModelError(
                f"The fine-tune trains single tokens of `{canonical_name(name)}`, whose weight the model ties to "
                f"`{module_name}`: train with `ensure_weight_tying=True`, or leave out `trainable_token_indices`."
            )


def _check_experts(name: str, wrapper: Any) -> None:
    """Of a LoRA on a parameter: `name` is that of PEFT's wrapper, which may be around others."""
    place, leaf = canonical_name(name), wrapper.parameter_name
    if leaf not in expert_weights(wrapper):
        raise UnsupportedModelError(
            f"The fine-tune has a LoRA on the parameter `{place}.{leaf}`, and beside linear layers only the weights of "
            "experts can take one: leave it out of `target_parameters`, and name the linear layers in `target_modules` where "
            "`all-linear` brings it in."
        )


def _check_lora_untied(name: str, tied: Mapping[str, set[str]]) -> None:
    weight = f"{canonical_name(name)}.weight"
    if others := tied.get(weight, set()) - {weight}:
        raise UnsupportedModelError(
            f"The fine-tune has a LoRA on `{name}`, whose weight the model shares with `{min(others)}`: no merged checkpoint "
            "can hold both, so take it out of `target_modules`."
        )


def _check_adapter(name: str, module: Any) -> None:
    if isinstance(module, Embedding):
        return
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
