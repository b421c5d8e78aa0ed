"""Where a finished model's files lie: a folder, or a repository of the hub; and the headers of its
tensors. No model is made here.
"""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from ..config.validation import repository
from ..errors import UnsupportedModelError
from ..text import printable
from .contents import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MARKER,
    SAFEGUARDED,
    TRAINER_STATE,
    VECTOR,
)
from .tensor_file import StoredTensor, stored_tensors


_OF_A_MODEL = ("config.json", "*.safetensors*", "*.bin*", "global_step*")  # whole or damaged
_SHOWN = 3  # adapters in a message


def check_there(name_or_path: str) -> None:
    """Raises `UnsupportedModelError` for what is no folder here and can be none of the hub's names,
    so that the hub is not asked.
    """
    if Path(name_or_path).is_dir():
        return
    try:
        repository(name_or_path)
    except ValueError as error:
        kind = "is a file" if Path(name_or_path).is_file() else "is not there"
        raise UnsupportedModelError(
            f"The model's folder {name_or_path} {kind}: name the folder of a checkpoint or adapter, or a hub id."
        ) from error


def stored_file(name_or_path: str, revision: str | None, file: str) -> Path | None:
    """A file of a folder or of a repository of the hub, None where it is not there."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file
    else:
        try:
            path = Path(hf_hub_download(name_or_path, file, revision=revision))
        except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError):
            return None
    return path if path.is_file() else None


def adapter_base(name_or_path: str, revision: str | None = None) -> str | None:
    """The base model that an adapter directory or repository names, None if it is no adapter.

    Raises:
        UnsupportedModelError: There is no such folder, the adapter's config is damaged, or it is a
            safety vector. As a degraded model that would make its own opposite.
    """
    check_there(name_or_path)
    file = stored_file(name_or_path, revision, ADAPTER_CONFIG)
    if file is None:
        _check_holds_model(Path(name_or_path))
        return None
    if stored_file(name_or_path, revision, VECTOR.marker) is not None:
        raise UnsupportedModelError(
            f"{name_or_path} is a safety vector and no model: name a checkpoint, or the adapter of a fine-tune."
        )
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"{file} is damaged: save the adapter again.") from error
    if not (isinstance(base, str) and base):
        raise UnsupportedModelError(
            f"{file} names no base model: set `base_model_name_or_path` in it."
        )
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise UnsupportedModelError(
            f"{file} names {base} as its base model, which is an adapter itself: merge that one first and name the merged "
            "model in its place."
        )
    return base


def _check_holds_model(folder: Path) -> None:
    """Raises `UnsupportedModelError` for a folder that holds models in others at most."""
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _OF_A_MODEL):
        raise holds_no_model(folder)


def holds_no_model(folder: Path) -> UnsupportedModelError:
    """Says where a model may be meant: in a trainer's last checkpoint, or in the folder of an
    adapter's name, as PEFT saves one that is not called `default`.
    """
    steps = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    adapters = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    named = [path for path in adapters if path not in steps]
    if steps:
        last = max(steps, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        remedy = f"name {last}"
    elif named:
        remedy = f"name the adapter in it, {' or '.join(map(str, named[:_SHOWN]))}"
    else:
        remedy = "name the folder that `save_model` or `save_pretrained` wrote"
    return UnsupportedModelError(f"{printable(str(folder))} holds no model: {remedy}.")


def holds_vector(name_or_path: str, revision: str | None = None) -> bool:
    """Whether the header of an adapter's weights says that a safety vector is folded into them."""
    if stored_file(name_or_path, revision, ADAPTER_CONFIG) is None:
        return False
    file = stored_file(name_or_path, revision, ADAPTER_WEIGHTS)
    if file is None:
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return SAFEGUARDED in (opened.metadata() or {})
    except (OSError, SafetensorError):  # whoever reads the weights says so
        return False


def further_adapters(name_or_path: str) -> list[str]:
    """A warning where the folder of an adapter holds others in folders of their own, as PEFT saves
    several adapters of one model: only the first is read. A trainer's checkpoints and what this
    package has written are not meant.
    """
    folder = Path(name_or_path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return []
    others = sorted(
        path.parent.name
        for path in folder.glob(f"*/{ADAPTER_CONFIG}")
        if not any((path.parent / other).exists() for other in (TRAINER_STATE, MARKER))
    )
    if not others:
        return []
    return [
        f"{folder} holds further adapters ({', '.join(map(printable, others))}), and only its own is read: if they acted "
        "together in the training, merge them into one first."
    ]


def snapshot(name_or_path: str, revision: str | None = None) -> Path:
    """The folder with a checkpoint's weight files; a hub id's are downloaded."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        # By their usual names: some repositories hold the weights a second time, in another form.
        patterns = [
            "model.safetensors",
            "model-*.safetensors",
            "model.safetensors.index.json",
            "config.json",
        ]
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise unreadable(name_or_path, error) from error


def unreadable(name_or_path: str, error: BaseException) -> UnsupportedModelError:
    """Says that nothing is there: in the libraries' own words a mistyped path is a question of
    access or of the network.
    """
    first, _, rest = name_or_path.partition("/")
    here = f" (the folder {first} here holds no {rest})" if rest and Path(first).is_dir() else ""
    unreached = is_due_to(error, (LocalEntryNotFoundError,))
    hub = (
        "or connect to the hub, whose cache here does not hold it"
        if unreached
        else "or the revision and your access"
    )
    return UnsupportedModelError(
        f"The model {name_or_path} is neither a local directory nor a readable hub repository{here}: check the name, {hub}."
    )


def is_due_to(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> bool:
    """Whether an error, or one that it came from, is of a kind."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error is not None


def stored_weights(name_or_path: str, revision: str | None = None) -> dict[str, StoredTensor]:
    """The headers of a checkpoint's tensors (of an adapter: its base model's) by their names in the
    files.

    Raises:
        UnsupportedModelError: There is no such model.
        CheckpointError: A weight file is missing or damaged.
    """
    base = adapter_base(name_or_path, revision)
    return stored_tensors(snapshot(base or name_or_path, None if base else revision))
