"""Checkpoint files: their headers are read once, their tensors read and written by byte ranges.

A file of the safetensors format is the length of its header (8 bytes, little-endian), the header
(JSON: data type, shape and byte range of every tensor), and the tensors' bytes. `safetensors`
itself writes a file only from tensors that are all in memory; here a file can be larger than
memory.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .following_hash import FollowingHash


# as transformers names them
SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file: its data type, its shape, and where its bytes begin in the
    file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def columns(self) -> int:
        """Length of the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def num_rows(self) -> int:
        """How many rows of that length there are."""
        return prod(self.shape) // self.columns if self.columns else 0

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder (one file, or shards with their index) by their names in
    the files.

    Raises:
        CheckpointError: No safetensors weights, a file that is missing or damaged, or a data type
            that torch lacks.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        files = [SAFE_WEIGHTS_NAME]
    elif (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        files = _files_of_index(folder / SAFE_WEIGHTS_INDEX_NAME)
    else:
        raise CheckpointError(
            f"{folder} has no safetensors weights: save the model by `save_pretrained` first."
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= file_tensors(folder / file)
    return tensors


def _files_of_index(index: Path) -> list[str]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is damaged: save or download the checkpoint again."
        ) from error
    for file in files:
        if Path(file).name != file or not (index.parent / file).is_file():
            raise CheckpointError(
                f"{index} names {file}, which is not beside it: save or download the checkpoint again."
            )
    return files


def file_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes."""
    try:
        # the library's own checks: sizes, overlaps, a header that is too long
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}): save or download it again."
        ) from error
    header.pop("__metadata__", None)
    if unknown := {entry["dtype"] for entry in header.values()} - set(DTYPES):
        raise CheckpointError(
            f"{path} holds tensors of type {unknown.pop()}, which cannot be merged: use a 16-bit model."
        )
    tensors = {
        name: StoredTensor(
            path,
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].begin))


class TensorFile:
    """A safetensors file to be, whose tensors are written piece by piece and in any order, each
    piece once.

    It is hashed while it is written.

    Args:
        path: The file.
        contents: Data type and shape of every tensor.
    """

    def __init__(self, path: Path, contents: Mapping[str, tuple[torch.dtype, Sequence[int]]]):
        # Wide types first, as safetensors itself orders them: so every tensor is aligned to its own
        # item size.
        names = sorted(contents, key=lambda name: -contents[name][0].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._begin: dict[str, int] = {}
        end = 0
        for name in names:
            dtype, shape = contents[name]
            self._begin[name] = end
            end += prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [self._begin[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = open(path, "x+b", buffering=0)  # noqa: SIM115  (closed by `close` or `drop`)
        self._file.truncate(self._data + end)
        self._hash = FollowingHash(self._file.fileno(), self._data + end)
        self._write_at(0, len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        """Writes a contiguous CPU tensor's bytes, beginning `offset` bytes after the start of
        tensor `name`.
        """
        flat = tensor.detach().reshape(-1)
        if flat.numel():
            self._write_at(
                self._data + self._begin[name] + offset,
                memoryview(flat.view(torch.uint8).numpy().data),
            )

    def close(self) -> str:
        """Closes the file when the disk has all of it; returns its SHA-256 in hex."""
        digest = self._hash.finish()
        os.fsync(self._file.fileno())
        self._file.close()
        return digest

    def give_up(self) -> None:
        """The file will not be completed: whoever is closing it need not wait for its hash."""
        self._hash.stop()

    def drop(self) -> None:
        """Closes the file as it is."""
        self._hash.stop()
        self._file.close()

    def _write_at(self, position: int, data: bytes | memoryview) -> None:
        first, rest = position, memoryview(data)
        while rest:
            written = os.pwrite(self._file.fileno(), rest, position)
            rest, position = rest[written:], position + written
        self._hash.written(first, position)


def commonest_dtype(contents: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> torch.dtype:
    """The data type of most floating-point numbers: `config.json` may say what was loaded."""
    sizes: Counter[torch.dtype] = Counter()
    for dtype, shape in contents.values():
        if dtype.is_floating_point:
            sizes[dtype] += prod(shape)
    return sizes.most_common(1)[0][0]


def plan_files(
    contents: Mapping[str, tuple[torch.dtype, Sequence[int]]], max_shard_size: str
) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """Which tensors go into which file, and the index to be written beside more than one file."""
    shapes = {
        name: torch.empty(tuple(shape), dtype=dtype, device="meta")
        for name, (dtype, shape) in contents.items()
    }
    pattern = SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern=pattern, max_shard_size=max_shard_size
    )
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    return plan.filename_to_tensors, index if plan.is_sharded else None
