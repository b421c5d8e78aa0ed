"""The vector merged into a finished model from file to file: read, changed and written in blocks of
rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..models.data_types import check_range
from ..models.rounding import Rounding, is_finite
from ..models.supported import check_untied
from ..progress import bar_of
from .checkpoint_folder import CheckpointFolder
from .merge_terms import ScaledVector, Term, add_terms
from .row_blocks import Block, RowReader, in_threads, row_blocks
from .stored_model import StoredModel
from .tensor_file import StoredTensor, TensorFile, commonest_dtype, stored_tensors
from .weight_files import WeightFiles


@torch.no_grad()
def write_merged(
    stored: StoredModel,
    vector: ScaledVector,
    folder: CheckpointFolder,
    show_progress: bool = True,
) -> Rounding:
    """Writes `W + ΔW_task + λ·B·A`, added in float32 and cast once, as a full checkpoint in the
    data types of `stored.types`: by default the files' own.

    Every byte is read once and written once, by as many threads as this process has cores. What no
    delta and no adapter touches is copied as it is.

    Returns:
        What the files' data types leave of the vector's change.

    Raises:
        UnsupportedModelError: The files hold a module of the vector in another form than the model,
            or share its weight.
        CheckpointError: A weight is NaN or infinite already.
        OutputError: A weight becomes NaN or infinite, or all of the vector is rounded away.
    """
    check_untied(stored.model, vector.deltas)
    own = stored.own_tensors()
    tensors = _as_written(stored, own)
    contents = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in own.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"The adapter's own `{name}` holds NaN or infinity: its training has diverged."
            )
    additions = _additions(stored, vector)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    bar = bar_of("Merging", total, show_progress, unit="B", unit_scale=True)
    rounding = Rounding()
    with bar, RowReader() as reader, WeightFiles(folder, contents) as files:
        for file_name, names in files.plan.items():
            file = files.open(file_name)
            blocks = [block for name in names for block in row_blocks(name, tensors[name])]
            for written, part in in_threads(
                partial(_merge_block, stored, own, additions, reader, file), blocks
            ):
                rounding.include(part)
                bar.update(written)
            files.finish(file_name)
        files.complete()
    rounding.check()
    folder.save_record(
        stored.model, None if stored.types.asked is None else commonest_dtype(contents)
    )
    return rounding


def _as_written(stored: StoredModel, own: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """The files' tensors with the data types and shapes that they will have: an adapter's own
    embeddings may have more rows.
    """
    return {
        name: replace(
            tensor,
            dtype=stored.written_dtype(name),
            shape=tuple(own[name].shape) if name in own else tensor.shape,
        )
        for name, tensor in stored.files.items()
    }


@dataclass(frozen=True)
class _Additions:
    """What is added to a stored tensor: the adapter's terms first, then the vector's."""

    task: list[Term]
    vector: list[Term]


def _additions(stored: StoredModel, vector: ScaledVector) -> dict[str, _Additions]:
    found = {name: _Additions(stored.task_terms(name), []) for name in stored.files}
    for matrix in vector.deltas:
        if not stored.pieces(matrix):
            raise UnsupportedModelError(
                f"The files hold `{matrix}` in another form than the model: run `safegene apply` without fixed "
                "coefficients, which merges the loaded model."
            )
        terms = vector.terms(matrix, stored.is_transposed(matrix))
        for name, term in stored.spread(matrix, terms):
            found[name].vector.append(term)
    return found


def _merge_block(
    stored: StoredModel,
    own: Mapping[str, torch.Tensor],
    additions: Mapping[str, _Additions],
    reader: RowReader,
    file: TensorFile,
    block: Block,
) -> tuple[int, Rounding]:
    """Reads, changes and writes one block; returns how many bytes it has, and what is left of the
    vector's change.
    """
    rows, rounding = _merged_rows(stored, own, additions, reader, block)
    row_bytes = stored.files[block.name].columns * rows.itemsize
    file.write(block.name, rows, offset=block.first * row_bytes)
    return rows.numel() * rows.itemsize, rounding


def _merged_rows(
    stored: StoredModel,
    own: Mapping[str, torch.Tensor],
    additions: Mapping[str, _Additions],
    reader: RowReader,
    block: Block,
) -> tuple[torch.Tensor, Rounding]:
    """A block as it is written, of an adapter's `own` tensors where it has one, else in a buffer of
    this thread; and what is left of the vector's change.

    In another data type than the files' everything is float32 until it is cast.
    """
    tensor, terms, rounding = stored.files[block.name], additions[block.name], Rounding()
    dtype = stored.written_dtype(block.name)
    if block.name in own:  # an adapter may hold a weight of its own and a LoRA on it
        held = own[block.name].reshape(-1, tensor.columns)
        rows = held[block.first : block.stop].clone()
    else:
        rows = reader.rows(tensor, block)
    if not is_finite(rows):
        raise CheckpointError(
            f"`{block.name}` in {tensor.path} holds NaN or infinity: the training has diverged, or the file is damaged."
        )
    if dtype != tensor.dtype:
        rows = reader.scratch(rows, "own")
    stored.put_trained_rows(block, rows)
    if not is_finite(rows):
        raise CheckpointError(
            f"The adapter's own rows of `{block.name}` hold NaN or infinity: its training has diverged."
        )
    if not (terms.task or terms.vector):
        return _cast(block.name, rows, dtype), rounding
    total = reader.scratch(rows)
    add_terms(total, terms.task, block.first)
    before = reader.scratch(total, "before") if terms.vector else None
    add_terms(total, terms.vector, block.first)
    rows = rows.copy_(total) if dtype == tensor.dtype else _cast(block.name, total, dtype)
    if before is not None:
        # nothing was added yet to what the written type holds
        exact = not terms.task and dtype == tensor.dtype
        rounding.add(block.name, before, total, rows, before_is_rounded=exact)
    elif not is_finite(rows):
        raise CheckpointError(
            f"`{block.name}` becomes NaN or infinite by the adapter: its training has diverged."
        )
    return rows, rounding


def _cast(name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows in the data type that is written, which must hold them."""
    if dtype == torch.float16 != rows.dtype:
        check_range(name, rows, dtype)
    return rows.to(dtype)


@torch.no_grad()
def check_written(stored: StoredModel, vector: ScaledVector, folder: Path) -> int:
    """Reads back what `write_merged` wrote, and works every block out anew; returns how many
    tensors there are.

    Raises:
        CheckpointError: A tensor is missing, or is not, bit by bit, `W + ΔW_task + λ·B·A`.
    """
    written, own = stored_tensors(folder), stored.own_tensors()
    additions, tensors = _additions(stored, vector), _as_written(stored, own)
    different = set(stored.files.keys() ^ written.keys())
    with RowReader() as source, RowReader() as reader:

        def check(block: Block) -> None:
            there = reader.rows(written[block.name], block)
            meant, _ = _merged_rows(stored, own, additions, source, block)
            if meant.dtype != there.dtype or not torch.equal(_bits(meant), _bits(there)):
                different.add(block.name)

        blocks = [
            b
            for name in stored.files.keys() & written.keys()
            for b in row_blocks(name, tensors[name])
        ]
        for _ in in_threads(check, blocks):
            pass
    if different:
        raise CheckpointError(
            f"`{min(different)}` in the written checkpoint is not the base's tensor with the fine-tune and the vector in it: do not "
            "use it; check the disk, then run it again."
        )
    return len(written)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
