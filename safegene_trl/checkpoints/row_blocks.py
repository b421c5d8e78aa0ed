"""Stored tensors read in blocks of rows, at the disk's pace, by as many threads as this process has
cores.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import CheckpointError
from .tensor_file import StoredTensor


BLOCK_ITEMS = 2**19  # 2 MiB in float32: what a core's own cache holds
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Block:
    """Rows `first` to `stop` (not included) of one stored tensor."""

    name: str
    first: int
    stop: int


def row_blocks(
    name: str, tensor: StoredTensor, first_row: int = 0, rows: int | None = None
) -> Iterator[Block]:
    """The blocks of a tensor, or of `rows` of its rows, of about `BLOCK_ITEMS` items each."""
    step = max(1, BLOCK_ITEMS // max(1, tensor.columns))
    stop = tensor.num_rows if rows is None else first_row + rows
    for first in range(first_row, stop, step):
        yield Block(name, first, min(first + step, stop))


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
        read_exactly(self._descriptor(tensor.path), view, position, tensor.path)
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


def read_exactly(descriptor: int, view: memoryview, position: int, path: Path) -> None:
    """Fills `view` with an open file's bytes from `position` on.

    Raises:
        CheckpointError: The file ends before that.
    """
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            raise CheckpointError(f"{path} became shorter while it was read: run it again.")
        view, position = view[count:], position + count


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
