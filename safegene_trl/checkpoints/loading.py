"""Finished checkpoints and adapters as live models."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from ..distributed.layouts import Sharding, load_distributed
from ..errors import UnsupportedModelError
from ..models.parameters import changes_base, check_method, tie_saved_modules
from ..text import one_line
from .completeness import (
    causal_architecture,
    check_loaded,
    empty_model,
    load_adapter,
    read_adapter_config,
)
from .contents import ADAPTER_CONFIG
from .source import adapter_base, check_there, is_due_to, snapshot, stored_file, unreadable
from .tensor_file import StoredTensor, stored_tensors


logger = logging.getLogger(__name__)
_OF_A_MODEL = (
    "config.json",
    ADAPTER_CONFIG,
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
)
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    SafetensorError,
)  # what the libraries raise on damaged or foreign files
_NOT_THERE = (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError)
_NOTHING = torch.zeros(8, dtype=torch.uint8)  # the bytes of one number of any type


def _read_config(name_or_path: str, revision: str | None = None) -> PreTrainedConfig:
    check_there(name_or_path)
    return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)


def check_readable(name_or_path: str, revision: str | None = None) -> None:
    """Raises `UnsupportedModelError` where neither a folder nor the hub has a model of this name;
    nothing more is checked.
    """
    if adapter_base(name_or_path, revision) is not None or Path(name_or_path).is_dir():
        return
    try:
        _read_config(name_or_path, revision)
    except OSError as error:
        raise unreadable(name_or_path, error) from error
    except ValueError:  # it is there; whether it can be trained is not told here
        return


def _not_loaded(what: str, name_or_path: str, error: Exception) -> UnsupportedModelError:
    """An error of the libraries in one of ours; `what` says what could not be loaded,
    `name_or_path` what was asked for.
    """
    if not Path(name_or_path).is_dir() and is_due_to(error, _NOT_THERE):
        return unreadable(name_or_path, error)
    return UnsupportedModelError(f"{what} cannot be loaded: {one_line(error)}")


def checkpoint_dtype(name_or_path: str, revision: str | None = None) -> str:
    """Name of the data type a checkpoint (of an adapter: its base model) was saved in, e.g.
    `bfloat16`.
    """
    base = adapter_base(name_or_path, revision)
    try:
        config = _read_config(base or name_or_path, None if base else revision)
    except (OSError, ValueError) as error:
        raise _not_loaded(
            f"The model {base or name_or_path}", base or name_or_path, error
        ) from error
    return str(config.dtype or torch.float32).removeprefix("torch.")


def resolve_dtype(dtype: str | None, name_or_path: str, revision: str | None = None) -> str:
    """`dtype` itself; where it is None or `auto`, the one that the checkpoint was saved in."""
    return checkpoint_dtype(name_or_path, revision) if dtype in (None, "auto") else str(dtype)


def load_placed(
    name_or_path: str,
    revision: str | None,
    dtype: str | None,
    job: Sharding,
    allow_pickle: bool = False,
) -> tuple[nn.Module, Sharding]:
    """Collective: a finished checkpoint, whole or sharded as this job was launched (see
    `sharding.place`).
    """
    with job.raising_together():
        found = resolve_dtype(dtype, name_or_path, revision)
        # Once the launch has switched ZeRO-3 on, transformers no longer tells what did not fit.
        check_complete(name_or_path, revision)
    return load_distributed(
        lambda: load_model(name_or_path, revision, found, allow_pickle), getattr(torch, found), job
    )


def check_complete(name_or_path: str, revision: str | None = None) -> None:
    """Raises unless a checkpoint's (of an adapter: its base model's) files hold all of its model
    and nothing else.

    Only headers are read. Quantised checkpoints and DeepSpeed's own shards are left to those who
    read them.

    Raises:
        CheckpointError: Named in the message.
    """
    base = adapter_base(name_or_path, revision)
    named, revision = base or name_or_path, None if base else revision
    if is_deepspeed_zero3_enabled() or (base is None and holds_only_zero_shards(Path(named))):
        return
    try:
        config = _read_config(named, revision)
        if not getattr(config, "quantization_config", None):
            empty_model(config, stored_tensors(snapshot(named, revision)), named)
    except UNREADABLE as error:
        raise _not_loaded(f"The model {named}", named, error) from error


def load_model(
    name_or_path: str, revision: str | None = None, dtype: str = "auto", allow_pickle: bool = False
) -> nn.Module:
    """A causal language model in eval mode; an adapter stays a PEFT model on its base. Custom code
    is never run.

    A local `checkpoint-N` that holds only the shards of a DeepSpeed ZeRO training is put together
    from those.

    Args:
        name_or_path: Directory or hub id.
        revision: Branch, tag or commit on the hub.
        dtype: Data type to load it in; `auto` keeps the checkpoint's.
        allow_pickle: Whether DeepSpeed's shards, which are pickle files that can run code, may be
            read.

    Raises:
        CheckpointError: Weights are missing, of another shape, or not the model's.
        UnsupportedModelError: It cannot be loaded.
    """
    base = adapter_base(name_or_path, revision)
    named = name_or_path if base is None else base
    kwargs: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "use_safetensors": True,
        "output_loading_info": True,
    }
    try:
        if base is None and holds_only_zero_shards(Path(name_or_path)):
            architecture, config = causal_architecture(_read_config(name_or_path))
            weights = _zero_weights(Path(name_or_path), kwargs["dtype"], allow_pickle)
            model, info = architecture.from_pretrained(
                None, config=config, state_dict=weights, **kwargs
            )
        else:
            check_complete(name_or_path, revision)
            loader: Any = AutoModelForCausalLM
            model, info = loader.from_pretrained(
                named, revision=None if base else revision, trust_remote_code=False, **kwargs
            )
        if not getattr(model.config, "quantization_config", None):
            check_loaded(info, named)
        return model.eval() if base is None else load_adapter(model, name_or_path, revision)
    except UNREADABLE as error:
        what = name_or_path if base is None else f"{name_or_path} (on {base})"
        raise _not_loaded(f"The model {what}", named, error) from error


def load_skeleton(
    name_or_path: str, revision: str | None = None, files: Mapping[str, StoredTensor] | None = None
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
        config = _read_config(named, None if base else revision)
        if getattr(config, "quantization_config", None):
            raise UnsupportedModelError(
                f"{named} is a quantised checkpoint: name the 16-bit model it was made from."
            )
        if base is not None:
            adapter = read_adapter_config(name_or_path, revision)
            check_method(adapter)
            if changes_base(adapter):
                raise UnsupportedModelError(
                    f"{name_or_path} is a LoRA with `init_lora_weights={adapter.init_lora_weights!r}`, which changed its base "
                    "model's weights: it is merged only as a loaded model, by `safegene apply` without fixed coefficients."
                )
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
    except UNREADABLE as error:
        raise _not_loaded(f"The model {name_or_path}", named, error) from error


def _empty(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )


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


def _check_holds_something(folder: Path) -> None:
    """Raises `UnsupportedModelError` for a folder without a model, e.g. a trainer's that holds only
    its checkpoints.
    """
    if not folder.is_dir() or any((folder / name).is_file() for name in _OF_A_MODEL):
        return
    steps = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    checkpoints = sorted(steps, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    remedy = (
        f"name {checkpoints[-1]}"
        if checkpoints
        else "name the folder that `save_model` or `save_pretrained` wrote"
    )
    raise UnsupportedModelError(f"{folder} holds no model: {remedy}.")


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; an adapter without one has its base model's."""
    check_there(name_or_path)
    _check_holds_something(Path(name_or_path))
    try:
        return AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        base = adapter_base(name_or_path, revision)
        if base is None:
            raise _not_loaded(f"The tokenizer of {name_or_path}", name_or_path, error) from error
        return load_tokenizer(base)


def load_processor(name_or_path: str, revision: str | None = None) -> Any:
    """What stands between text or images and a checkpoint: its processor where it has one, else its
    tokenizer. An adapter without a processor has its base model's, around its own tokenizer.

    Raises:
        UnsupportedModelError: One of the two cannot be read.
    """
    tokenizer = load_tokenizer(name_or_path, revision)
    base = adapter_base(name_or_path, revision)
    for source, at in ((name_or_path, revision), *([] if base is None else [(base, None)])):
        if any(stored_file(source, at, file) for file in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)):
            try:
                processor = AutoProcessor.from_pretrained(
                    source, revision=at, trust_remote_code=False
                )
            except (*UNREADABLE, ImportError, AttributeError, TypeError) as error:
                raise _not_loaded(f"The processor of {source}", source, error) from error
            if isinstance(processor, ProcessorMixin):
                processor.tokenizer = tokenizer
                return processor
    return tokenizer


def holds_only_zero_shards(folder: Path) -> bool:
    """Whether a checkpoint is one of DeepSpeed's own, which neither transformers nor PEFT can load."""
    return (folder / "latest").is_file() and not any(folder.glob("*.safetensors"))


def _zero_weights(
    folder: Path, dtype: torch.dtype | str, allow_pickle: bool
) -> dict[str, torch.Tensor]:
    """The float32 master weights of a ZeRO checkpoint, each cast to `dtype` as soon as it is put
    together.
    """
    if not allow_pickle:
        raise UnsupportedModelError(
            f"{folder} holds only DeepSpeed's own shards, which are pickle files that can run code: convert them by "
            "DeepSpeed's `zero_to_fp32.py --safe_serialization`, or set `allow_pickled_shards` if they are yours."
        )
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise UnsupportedModelError(
            f"{folder} holds DeepSpeed shards: install `safegene-trl[deepspeed]` to read them."
        ) from error
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    if Path(tag).name != tag or not (folder / tag).is_dir():
        raise UnsupportedModelError(
            f"`latest` in {folder} does not name a folder beside it: restore the checkpoint."
        )
    logger.warning(
        "Reading DeepSpeed's shards in %s, which are pickle files that can run code.", folder
    )
    shards = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag, lazy_mode=True)
    wanted = torch.float32 if isinstance(dtype, str) else dtype
    return {name: shards[name].contiguous().to(wanted) for name in list(shards)}
