"""Finished checkpoints and adapters as live models."""

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
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from ..distributed.layouts import Sharding, load_distributed
from ..errors import UnsupportedModelError
from ..text import one_line
from .completeness import (
    causal_architecture,
    check_loaded,
    empty_model,
    load_adapter,
    reads_images,
)
from .contents import ADAPTER_CONFIG
from .source import (
    adapter_base,
    check_there,
    holds_no_model,
    is_due_to,
    snapshot,
    stored_file,
    unreadable,
)
from .tensor_file import stored_tensors
from .zero_shards import holds_only_zero_shards, zero_weights


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


def read_config(name_or_path: str, revision: str | None = None) -> PreTrainedConfig:
    check_there(name_or_path)
    return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)


def check_readable(name_or_path: str, revision: str | None = None) -> None:
    """Raises `UnsupportedModelError` where neither a folder nor the hub has a model of this name;
    nothing more is checked.
    """
    if adapter_base(name_or_path, revision) is not None or Path(name_or_path).is_dir():
        return
    try:
        read_config(name_or_path, revision)
    except OSError as error:
        raise unreadable(name_or_path, error) from error
    except ValueError:  # it is there; whether it can be trained is not told here
        return


def stored_vocabulary(name_or_path: str | None, revision: str | None = None) -> int | None:
    """How many tokens the vocabulary of a checkpoint has by its config, None where that cannot be
    read: a model may be only in memory, or was moved away.
    """
    if not name_or_path:
        return None
    try:
        config = read_config(name_or_path, revision).get_text_config()
    except (OSError, ValueError, UnsupportedModelError):
        return None
    size: int | None = getattr(config, "vocab_size", None)
    return size


def not_loaded(what: str, name_or_path: str, error: Exception) -> UnsupportedModelError:
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
        config = read_config(base or name_or_path, None if base else revision)
    except (OSError, ValueError) as error:
        raise not_loaded(
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
        config = read_config(named, revision)
        if not getattr(config, "quantization_config", None):
            empty_model(config, stored_tensors(snapshot(named, revision)), named)
    except UNREADABLE as error:
        raise not_loaded(f"The model {named}", named, error) from error


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
            architecture, config = causal_architecture(read_config(name_or_path))
            weights = zero_weights(Path(name_or_path), kwargs["dtype"], allow_pickle)
            model, info = architecture.from_pretrained(
                None, config=config, state_dict=weights, **kwargs
            )
        else:
            check_complete(name_or_path, revision)
            at = None if base else revision
            images = reads_images(read_config(named, at))
            loader: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
            model, info = loader.from_pretrained(
                named, revision=at, trust_remote_code=False, **kwargs
            )
        if not getattr(model.config, "quantization_config", None):
            check_loaded(info, named)
        return model.eval() if base is None else load_adapter(model, name_or_path, revision)
    except UNREADABLE as error:
        what = name_or_path if base is None else f"{name_or_path} (on {base})"
        raise not_loaded(f"The model {what}", named, error) from error


def _check_holds_something(folder: Path) -> None:
    """Raises `UnsupportedModelError` for a folder without a model, e.g. a trainer's that holds only
    its checkpoints.
    """
    if folder.is_dir() and not any((folder / name).is_file() for name in _OF_A_MODEL):
        raise holds_no_model(folder)


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
            raise not_loaded(f"The tokenizer of {name_or_path}", name_or_path, error) from error
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
                raise not_loaded(f"The processor of {source}", source, error) from error
            if isinstance(processor, ProcessorMixin):
                processor.tokenizer = tokenizer
                if source != name_or_path and tokenizer.chat_template:  # that of the training
                    processor.chat_template = tokenizer.chat_template
                return processor
    return tokenizer
