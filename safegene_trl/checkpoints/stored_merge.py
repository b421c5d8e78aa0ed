"""Finished models whose weights stay on disk: read, changed and written in blocks of rows, at the
disk's pace.

Names, shapes and adapters come from a skeleton of the model without weights, so memory does not
grow with the model.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError, UnsupportedModelError
from ..models.low_rank import LowRankDelta
from ..models.names import layer_index
from ..models.parameters import (
    Parameter,
    as_stored,
    base_model,
    canonical_parameters,
    check_supported,
    check_untied,
    is_transposed,
    task_factors,
    tied_weights,
)
from ..models.rounding import Rounding, is_finite
from .completeness import stored_names
from .live_merge import (
    Coefficient,
    Term,
    add_terms,
    save_record,
    task_terms,
    vector_terms,
    write_index,
)
from .loading import is_placeholder, load_skeleton
from .source import adapter_base, stored_weights
from .tensor_file import StoredTensor, TensorFile, plan_files


BLOCK_ITEMS = 2**19  # 2 MiB in float32: what a core's own cache holds
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass
class StoredModel:
    """A finished checkpoint, or an adapter on one.

    Attributes:
        model: The model without its weights; an adapter on it is real.
        files: The checkpoint's (or the base model's) tensors by their names in its files.
        name: What it was opened by, for messages.
    """

    model: nn.Module
    files: dict[str, StoredTensor]
    name: str

    @classmethod
    def open(
        cls,
        name_or_path: str,
        revision: str | None = None,
        files: dict[str, StoredTensor] | None = None,
    ) -> "StoredModel":
        """Reads headers, config and adapter.

        Args:
            name_or_path: Directory or hub id of a checkpoint or LoRA adapter.
            revision: Branch, tag or commit on the hub.
            files: Its headers from `stored_weights`, if they are read already.

        Raises:
            UnsupportedModelError: Quantised, or a fine-tune whose weights cannot be merged exactly.
            CheckpointError: A weight file is missing or damaged, lacks a tensor of the model, or
                holds one that is not its own.
        """
        files = stored_weights(name_or_path, revision) if files is None else files
        model = load_skeleton(name_or_path, revision, files)
        check_supported(model)
        stored = cls(model, files, name_or_path)
        if unlike := sorted(stored.required_names - files.keys()):
            raise CheckpointError(
                f"{adapter_base(name_or_path, revision) or name_or_path} has another name for `{unlike[0]}`: load it by transformers and save it by `save_pretrained` first."
            )
        return stored

    @cached_property
    def required_names(self) -> set[str]:
        """The names in the files of all that the model reads. What else lies in the files is copied
        as it is.
        """
        tensors = {
            parameter.name: torch.empty(
                parameter.shape, dtype=parameter.tensor.dtype, device="meta"
            )
            for parameter in canonical_parameters(self.model)
        }
        # Of tied weights the files may hold any one.
        for name, group in tied_weights(self.model).items():
            held = sorted(group & self.files.keys())
            if name in tensors and held and name not in held:
                tensors[held[0]] = tensors.pop(name)
        return set(stored_names(base_model(self.model), tensors))

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The model's parameters by their names in the files, where one tensor of a file is one
        parameter.
        """
        found: dict[str, Parameter] = {}
        for parameter in canonical_parameters(self.model):
            names = [parameter.name]
            if parameter.name not in self.files:
                mark = torch.empty(parameter.shape, device="meta")
                names = [
                    name
                    for name, part in as_stored(self.model, parameter.name, mark).items()
                    if part is mark
                ]
            found |= {name: parameter for name in names if name in self.files}
        return found

    @cached_property
    def weight_files(self) -> dict[str, str]:
        """Name in the files of every module's weight, by canonical module name."""
        return {
            parameter.module_name: name
            for name, parameter in self.parameters.items()
            if parameter.is_weight
        }

    @property
    def has_full_rank_changes(self) -> bool:
        """Whether an adapter changes linear layers by more than low-rank additions: by DoRA, or by
        weights of its own.
        """
        weights = [parameter for parameter in self.parameters.values() if parameter.is_weight]
        factors = [factor for parameter in weights for factor in task_factors(parameter.module)]
        own = [parameter for parameter in weights if not is_placeholder(parameter.tensor)]
        layers = [parameter for parameter in own if layer_index(parameter.module_name) is not None]
        return any(factor.dora is not None for factor in factors) or any(
            p.tensor.dim() > 1 for p in layers
        )

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """What an adapter holds in the place of whole tensors of its base model, e.g. by
        `modules_to_save`.
        """
        own = {
            name: parameter.tensor.detach().to(self.files[name].dtype).contiguous()
            for name, parameter in self.parameters.items()
            if not is_placeholder(parameter.tensor)
        }
        for name, group in tied_weights(
            self.model
        ).items():  # a file may hold a tied weight under both names
            if name in own:
                own |= dict.fromkeys(group & self.files.keys(), own[name])
        return own

    def task_terms(self, name: str) -> list[Term]:
        """What the adapter adds to a tensor of the base model."""
        parameter = self.parameters.get(name)
        if parameter is None or not parameter.is_weight:
            return []
        return task_terms(task_factors(parameter.module), is_transposed(parameter.module))

    @torch.no_grad()
    def matrix(self, reader: "RowReader", module: str) -> torch.Tensor:
        """A linear layer's weight with the adapter folded in: d_out×d_in, float32."""
        name = self.weight_files[module]
        stored = self.files[name]
        weight = torch.empty(stored.shape)
        for block in row_blocks(name, stored):
            weight[block.first : block.stop] = self.rows(reader, block)
        return weight.T if is_transposed(self.parameters[name].module) else weight

    @torch.no_grad()
    def rows(self, reader: "RowReader", block: "Block", buffer: str = "wide") -> torch.Tensor:
        """A block of a tensor with the adapter folded in, float32, in a buffer of this thread."""
        parameter = self.parameters.get(block.name)
        if parameter is None or is_placeholder(parameter.tensor):
            stored = reader.rows(self.files[block.name], block)
        else:
            stored = parameter.tensor.detach().reshape(-1, self.files[block.name].columns)[
                block.first : block.stop
            ]
        wide = reader.scratch(stored, buffer)
        add_terms(wide, self.task_terms(block.name), block.first)
        return wide


@torch.no_grad()
def write_merged(
    stored: StoredModel,
    deltas: Mapping[str, LowRankDelta],
    coefficients: Mapping[str, Coefficient],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_shard_size: str,
    mark: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> Rounding:
    """Writes `W + ΔW_task + λ·B·A`, added in float32 and cast once, as a full checkpoint in the
    files' own data types.

    Every byte is read once and written once, by as many threads as this process has cores. What no
    delta and no adapter touches is copied as it is. `coefficients` are by module name; `mark` goes
    into `config.json` (see `lineage.py`).

    Returns:
        What the files' data types leave of the vector's change.

    Raises:
        UnsupportedModelError: The files hold a module of the vector in another form than the model,
            or share its weight.
        CheckpointError: A weight is NaN or infinite already.
        OutputError: A weight becomes NaN or infinite, or all of the vector is rounded away.
    """
    check_untied(stored.model, deltas)
    own = stored.own_tensors()
    contents = {
        name: (tensor.dtype, own.get(name, tensor).shape) for name, tensor in stored.files.items()
    }
    additions = _additions(stored, deltas, coefficients)
    plan, index = plan_files(contents, max_shard_size)
    total = sum(tensor.num_bytes for name, tensor in stored.files.items() if name not in own)
    bar = tqdm(
        total=total,
        desc="Merging",
        unit="B",
        unit_scale=True,
        disable=not show_progress,
        leave=False,
    )
    rounding = Rounding()
    with bar, RowReader() as reader:
        for file_name, names in plan.items():
            with TensorFile(folder / file_name, {name: contents[name] for name in names}) as file:
                for name in own.keys() & names:
                    if not is_finite(own[name]):
                        raise CheckpointError(
                            f"The adapter's own `{name}` holds NaN or infinity: its training has diverged."
                        )
                    file.write(name, own[name])
                blocks = [
                    block
                    for name in names
                    if name not in own
                    for block in row_blocks(name, stored.files[name])
                ]
                for written, part in in_threads(
                    partial(_merge_block, stored, additions, reader, file), blocks
                ):
                    rounding.include(part)
                    bar.update(written)
    rounding.check()
    if index:
        write_index(index, folder)
    save_record(stored.model, tokenizer, folder, mark)
    return rounding


@dataclass(frozen=True)
class _Additions:
    """What is added to a stored tensor: the adapter's terms first, then the vector's."""

    task: list[Term]
    vector: list[Term]


def _additions(
    stored: StoredModel, deltas: Mapping[str, LowRankDelta], coefficients: Mapping[str, Coefficient]
) -> dict[str, _Additions]:
    found = {name: _Additions(stored.task_terms(name), []) for name in stored.files}
    for module, delta in deltas.items():
        name = stored.weight_files.get(module)
        if name is None:
            raise UnsupportedModelError(
                f"The files hold `{module}` in another form than the model: run `safegene apply` without fixed "
                "coefficients, which merges the loaded model."
            )
        transposed = is_transposed(stored.parameters[name].module)
        found[name].vector.extend(vector_terms(delta, coefficients[module], transposed))
    return found


def _merge_block(
    stored: StoredModel,
    additions: Mapping[str, _Additions],
    reader: "RowReader",
    file: TensorFile,
    block: "Block",
) -> tuple[int, Rounding]:
    """Reads, changes and writes one block; returns how many bytes it has, and what is left of the
    vector's change.
    """
    tensor, terms, rounding = stored.files[block.name], additions[block.name], Rounding()
    rows = reader.rows(tensor, block)
    if not is_finite(rows):
        raise CheckpointError(
            f"`{block.name}` in {tensor.path} holds NaN or infinity: the training has diverged, or the file is damaged."
        )
    if terms.task or terms.vector:
        total = reader.scratch(rows)
        add_terms(total, terms.task, block.first)
        if terms.vector:
            before = reader.scratch(total, "before")
            add_terms(total, terms.vector, block.first)
        rows.copy_(total)
        if terms.vector:
            exact = not terms.task  # nothing was added yet to what the file's type holds
            rounding.add(block.name, before, total, rows, before_is_rounded=exact)
        if not (terms.vector or is_finite(rows)):
            raise CheckpointError(
                f"`{block.name}` becomes NaN or infinite by the adapter: its training has diverged."
            )
    file.write(block.name, rows, offset=block.first * tensor.row_bytes)
    return rows.numel() * rows.itemsize, rounding


@dataclass(frozen=True)
class Block:
    """Rows `first` to `stop` (not included) of one stored tensor."""

    name: str
    first: int
    stop: int


def row_blocks(name: str, tensor: StoredTensor) -> Iterator[Block]:
    """The blocks of a tensor, of about `BLOCK_ITEMS` items each."""
    step = max(1, BLOCK_ITEMS // max(1, tensor.columns))
    for first in range(0, tensor.num_rows, step):
        yield Block(name, first, min(first + step, tensor.num_rows))


class RowReader:
    """Reads blocks of stored tensors into one buffer per thread, which is overwritten by the
    thread's next block.
    """

    def __init__(self):
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def rows(self, tensor: StoredTensor, block: Block) -> torch.Tensor:
        """The block in the tensor's own data type, shape (rows, columns)."""
        size = (block.stop - block.first) * tensor.row_bytes
        buffer = self._buffer("raw", size)
        view, position = (
            memoryview(buffer.numpy().data)[:size],
            tensor.begin + block.first * tensor.row_bytes,
        )
        while view:
            count = os.preadv(self._descriptor(tensor.path), [view], position)
            if count == 0:
                raise CheckpointError(
                    f"{tensor.path} became shorter while it was read: run it again."
                )
            view, position = view[count:], position + count
        return buffer[:size].view(tensor.dtype).view(-1, tensor.columns)

    def scratch(self, rows: torch.Tensor, name: str = "wide") -> torch.Tensor:
        """The same rows in float32, in another buffer of this thread."""
        wide = (
            self._buffer(name, rows.numel() * 4)[: rows.numel() * 4]
            .view(torch.float32)
            .view(rows.shape)
        )
        return wide.copy_(rows)

    def _buffer(self, name: str, size: int) -> torch.Tensor:
        buffer = getattr(self._local, name, None)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8)
            setattr(self._local, name, buffer)
        return buffer

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]


def in_threads(work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Results of `work` on all jobs, in order, on as many threads as this process has cores."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # every thread is a worker of its own
    try:
        with ThreadPoolExecutor(cores) as pool:
            try:
                yield from pool.map(work, jobs)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
