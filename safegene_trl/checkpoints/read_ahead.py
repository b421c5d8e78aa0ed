"""Whole stored tensors, which threads read before they are asked for."""

import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from .row_blocks import read_exactly
from .tensor_file import StoredTensor


AHEAD_BYTES = 2**28  # read and not asked for yet; at least one tensor, whatever its size
_PIECE = 2**24  # bytes that a thread reads at a time: fresh memory is what takes it longest
_MOST_THREADS = 8


class ReadAhead:
    """Gives stored tensors in the order in which they are named, each once, in CPU memory of its
    own.

    Args:
        files: Where tensors lie, by name.
        names: Which will be asked for, in that order.

    Raises:
        CheckpointError: When a tensor is asked for whose file has become shorter.
    """

    def __init__(self, files: Mapping[str, StoredTensor], names: Iterable[str]):
        self._files, self._left = files, deque(names)
        self._begun: deque[tuple[str, torch.Tensor, list[Future[None]]]] = deque()
        self._ahead = 0
        self._descriptors: dict[Path, int] = {}
        self._held = ExitStack()
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(threads)

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._held.close()

    def next(self) -> tuple[str, torch.Tensor]:
        """The next tensor and its name."""
        self._begin()
        name, tensor, pieces = self._begun.popleft()
        for piece in pieces:
            piece.result()
        self._ahead -= tensor.nbytes
        self._begin()
        return name, tensor

    def _begin(self) -> None:
        while self._left and (not self._begun or self._ahead < AHEAD_BYTES):
            name = self._left.popleft()
            stored = self._files[name]
            tensor = torch.empty(stored.shape, dtype=stored.dtype)
            self._ahead += tensor.nbytes
            self._begun.append((name, tensor, self._read(stored, tensor)))

    def _read(self, stored: StoredTensor, tensor: torch.Tensor) -> list[Future[None]]:
        if not tensor.nbytes:
            return []
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        descriptor = self._descriptor(stored.path)
        return [
            self._threads.submit(
                read_exactly,
                descriptor,
                view[first : first + _PIECE],
                stored.begin + first,
                stored.path,
            )
            for first in range(0, tensor.nbytes, _PIECE)
        ]

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
            self._held.callback(os.close, self._descriptors[path])
        return self._descriptors[path]
