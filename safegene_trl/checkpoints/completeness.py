"""Whether files hold the whole of a model or adapter, and nothing that the model does not read.

transformers and PEFT load what fits, give random or base weights to the rest, and say so in a log.
Here that is an error. A checkpoint is judged by transformers' own rules of naming and converting,
on its files' headers alone.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from ..errors import CheckpointError, UnsupportedModelError
from .tensor_file import StoredTensor, file_tensors


FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 3  # names in a message


def causal_architecture(config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """The class of causal language models for a config, and the config that class takes: a class of
    text and images where the checkpoint is of one.

    Raises:
        UnsupportedModelError: transformers has no causal language model of that kind.
    """
    if reads_images(config):
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{type(config).__name__} belongs to no causal language model that transformers itself has: use another model."
        )
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if architecture.config_class == config.sub_configs.get("text_config"):
        config = config.get_text_config()
    return architecture, config


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint of this config is of a class of text and images: by the class that it
    names, else where transformers has no other for it.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    architecture: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return (
        architecture.__name__ in (config.architectures or ())
        or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )


def empty_model(
    config: PreTrainedConfig, files: Mapping[str, StoredTensor], named: str
) -> nn.Module:
    """The model of a checkpoint on the meta device, in float32, as transformers would make it from
    these files.

    Args:
        config: The checkpoint's config; its data type stays as it is.
        files: The headers of the checkpoint's tensors.
        named: What a message calls the checkpoint.

    Raises:
        CheckpointError: A tensor of the model is missing, has another shape or is no floating-point
            number, or the files hold tensors that the model does not read.
    """
    architecture, config = causal_architecture(config)
    headers = {
        name: torch.empty(file.shape, dtype=file.dtype, device="meta")
        for name, file in files.items()
    }
    dtypes = [part.dtype for part in config_parts(config)]
    try:
        with _quiet():
            model, info = architecture.from_pretrained(
                None,
                config=config,
                state_dict=headers,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are in the record then
                output_loading_info=True,
            )
    except RuntimeError as error:  # pieces that cannot be put together
        raise CheckpointError(
            f"{named} lacks pieces of a tensor of {architecture.__name__}, or holds them in other shapes: save or download "
            "the checkpoint again."
        ) from error
    check_loaded(info, named)
    model.tie_weights()  # transformers leaves empty weights untied where the files hold both
    for part, dtype in zip(config_parts(model.config), dtypes, strict=True):
        part.dtype = dtype  # the checkpoint's own, not the one of this model
    _check_numbers(model, files, named)
    return model


def config_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and the configs in it."""
    return [
        config,
        *(part for key in config.sub_configs if (part := getattr(config, key, None)) is not None),
    ]


def check_loaded(info: Mapping[str, Any], named: str) -> None:
    """Raises `CheckpointError` unless transformers' loading record says that every tensor found its
    place.
    """
    remedy = "save or download the checkpoint again, with the `config.json` it was saved with"
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{named} lacks {_names(missing)}, which would get random numbers: {remedy}."
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"`{name}` of {named} is {_shape(stored)} in the files and {_shape(expected)} in the model that `config.json` "
            f"describes: {remedy}."
        )
    if unexpected := sorted(info["unexpected_keys"]):
        raise CheckpointError(
            f"{named} holds {_names(unexpected)}, which its model does not read: {remedy}, or take them out."
        )


def stored_names(
    base: Any, tensors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """What a checkpoint's files call the model's tensors, tied ones under each of their names; the
    tensors are empty.
    """
    found = base.state_dict() if tensors is None else tensors
    empty = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in found.items()
    }
    return revert_weight_conversion(base, empty)


def _check_numbers(model: nn.Module, files: Mapping[str, StoredTensor], named: str) -> None:
    for name, tensor in stored_names(model).items():
        if name in files and tensor.is_floating_point() and files[name].dtype not in FLOATING:
            kind = str(files[name].dtype).removeprefix("torch.")
            raise CheckpointError(
                f"`{name}` of {named} holds quantised numbers ({kind}), which cannot be merged: name the 16-bit model it was "
                "made from."
            )


def read_adapter_config(name_or_path: str, revision: str | None = None) -> Any:
    """The PEFT config of a stored adapter.

    Raises:
        UnsupportedModelError: It names a method that PEFT does not have.
    """
    try:
        return PeftConfig.from_pretrained(name_or_path, revision=revision)
    except KeyError as error:
        raise UnsupportedModelError(
            f"The `adapter_config.json` of {name_or_path} names no method of PEFT ({error}): save the adapter again."
        ) from error


def load_adapter(
    base: Any, name_or_path: str, revision: str | None = None, low_cpu_mem_usage: bool = False
) -> PeftModel:
    """An adapter on its base model, in eval mode, as `PeftModel.from_pretrained` makes it.

    Raises:
        UnsupportedModelError: It has no safetensors weights, wants other code, lacks a tensor of
            one of its modules, or holds one that fits nowhere.
    """
    config = read_adapter_config(name_or_path, revision)
    # PEFT would import a module whose name is in the file
    if getattr(config, "megatron_config", None):
        raise UnsupportedModelError(
            f"{name_or_path} is an adapter for Megatron's own layers: convert it to plain ones."
        )
    file = _adapter_file(name_or_path, revision)
    config.inference_mode = True
    resize_vocabulary(base, config, file, name_or_path)
    kind: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    model: PeftModel = kind(base, config, "default", low_cpu_mem_usage=low_cpu_mem_usage)
    mapping = (
        None if config.is_prompt_learning else getattr(base, "_checkpoint_conversion_mapping", {})
    )
    try:
        result = model.load_adapter(
            name_or_path,
            "default",
            key_mapping=mapping,
            low_cpu_mem_usage=low_cpu_mem_usage,
            revision=revision,
        )
    except KeyError as error:  # of a module that is saved whole
        raise _incomplete(name_or_path, [str(error.args[0])]) from error
    if not config.is_prompt_learning:  # whose one tensor PEFT checks itself
        missing = [name for name in result.missing_keys if "vblora_vector_bank" not in name]
        missing += _missing_biases(model, file)
        if missing:
            raise _incomplete(name_or_path, missing)
        if unread := _unread(result.unexpected_keys, file):
            raise UnsupportedModelError(
                f"{name_or_path} holds {_names(unread)}, which fit no module of its base model: name "
                "the base model it was trained on in `adapter_config.json`, or save the adapter again."
            )
        _tie_loaded(model.get_base_model(), file_tensors(file))
    return model.eval()


def _unread(unexpected: Collection[str], file: Path) -> list[str]:
    """What an adapter holds and PEFT has not read, without what it holds a second time: where the
    vocabulary was resized PEFT saves the copies in `modules_to_save` under two names.
    """
    held = file_tensors(file)
    return sorted(
        name
        for name in unexpected
        if ".modules_to_save." not in name or name.replace(".modules_to_save", "") not in held
    )


def _tie_loaded(base: Any, held: Mapping[str, StoredTensor]) -> None:
    """Makes tied embeddings that an adapter holds one tensor again, where PEFT has given each of
    them a tensor of its own, as it does in a model without weights.
    """
    found = dict(base.named_parameters(remove_duplicate=False))
    for target, source in (getattr(base, "all_tied_weights_keys", None) or {}).items():
        one, other = found.get(target), found.get(source)
        if one is None or other is None or one is other or one.shape != other.shape:
            continue
        names = [name for name in (source, target) if f"base_model.model.{name}" in held]
        if len(names) == 1 or (names and torch.equal(one, other)):
            for name in {source, target} - {names[0]}:
                module, _, leaf = name.rpartition(".")
                setattr(base.get_submodule(module), leaf, found[names[0]])


def resize_vocabulary(base: Any, config: Any, file: Path, named: str) -> None:
    """Gives a base model the vocabulary that an adapter was trained with, where that is another:
    PEFT saves resized embeddings with it, and does not resize those that they are loaded into.

    Args:
        base: The base model as it is; changed.
        config: The adapter's.
        file: Its weights.
        named: What a message calls it.

    Raises:
        UnsupportedModelError: It trains single tokens, or the embeddings that it holds do not make
            a whole model.
    """
    if config.is_prompt_learning:
        return
    try:
        held, names = file_tensors(file), _embedding_names(base)
    except CheckpointError:  # PEFT, which reads all of it, says so
        return
    rows = {name: _rows(held, name) for name in names}
    wanted = {count for count in rows.values() if count is not None} - {
        base.get_input_embeddings().weight.shape[0]
    }
    if not wanted:
        return
    if getattr(config, "trainable_token_indices", None):
        raise UnsupportedModelError(
            f"{named} trains single tokens of a resized vocabulary: leave out `trainable_token_indices`, or merge the adapter "
            "into the model first, then run `safegene apply`."
        )
    if len(set(rows.values())) > 1:
        name = next(name for name in names if rows[name] not in wanted)
        raise UnsupportedModelError(
            f"{named} was trained with a vocabulary of {min(wanted)} tokens and does not hold its `{name}`: save it with "
            "`save_embedding_layers=True`."
        )
    base.resize_token_embeddings(min(wanted), mean_resizing=False)


def _embedding_names(base: Any) -> list[str]:
    """What a model calls its input embedding and, where that is a module with a weight of its own,
    its output embedding.
    """
    tied = getattr(base, "all_tied_weights_keys", None) or {}
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    found = [name for name, module in base.named_modules() if any(module is one for one in layers)]
    return [name for name in found if f"{name}.weight" not in tied]


def _rows(held: Mapping[str, StoredTensor], name: str) -> int | None:
    """How many rows an adapter's own copy of an embedding has, None where it holds none."""
    for part in ("", ".modules_to_save", ".base_layer", ".token_adapter.base_layer"):
        tensor = held.get(f"base_model.model.{name}{part}.weight")
        if tensor is not None:
            return tensor.shape[0]
    return None


def _incomplete(named: str, missing: Collection[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{named} lacks {_names(sorted(missing))}, which its `adapter_config.json` asks for: save the adapter again."
    )


def _missing_biases(model: PeftModel, file: Path) -> list[str]:
    """Trained biases have the names of the base model's own, so that PEFT does not miss them."""
    config: Any = model.peft_config["default"]
    if getattr(config, "bias", "none") == "none":
        return []
    held = file_tensors(file)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    return [name for name in expected if name.endswith(".bias") and name not in held]


def _adapter_file(name_or_path: str, revision: str | None) -> Path:
    file = Path(name_or_path) / SAFETENSORS_WEIGHTS_NAME
    if not Path(name_or_path).is_dir():
        try:
            return Path(hf_hub_download(name_or_path, SAFETENSORS_WEIGHTS_NAME, revision=revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise UnsupportedModelError(
                f"The adapter {name_or_path} has no readable {SAFETENSORS_WEIGHTS_NAME}: save it by `save_pretrained`."
            ) from error
    if not file.is_file():  # PEFT would take a pickle file in its place
        raise UnsupportedModelError(
            f"The adapter {name_or_path} cannot be loaded: it has no {SAFETENSORS_WEIGHTS_NAME}; save it by "
            "`save_pretrained`."
        )
    return file


def _names(names: Collection[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in list(names)[:_SHOWN])
    rest = len(names) - _SHOWN
    return f"{shown} and {rest} more tensors" if rest > 0 else shown


def _shape(shape: Collection[int]) -> str:
    return "×".join(map(str, shape)) or "one number"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and log: what they would say becomes an error here."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
