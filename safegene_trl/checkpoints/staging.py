"""Tensors on their way into files: piece by piece, those of a device through memory that it copies
into fast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch


PIECE_BYTES = 2**25
BUFFERS = 8  # pieces of a device's tensors that are in host memory at once


@dataclass(frozen=True)
class Piece:
    """Bytes of a tensor.

    Attributes:
        offset: Where in the tensor they begin.
        size: How many there are.
    """

    offset: int
    size: int
    _data: torch.Tensor
    _wait: Callable[[], None]
    _done: Callable[[], None]

    @contextmanager
    def in_memory(self) -> Iterator[torch.Tensor]:
        """While open, the bytes as a tensor of the CPU, shape (size,), uint8. Once only."""
        try:
            self._wait()
            yield self._data
        finally:
            self._done()


class Staging:
    """Cuts tensors into pieces.

    A piece of a CPU's tensor is the tensor's own memory. One of a device's is copied into one of
    `BUFFERS` page-locked buffers, which are used again and again: fresh memory takes longer than
    the copy.
    """

    def __init__(self) -> None:
        self._free: SimpleQueue[torch.Tensor] = SimpleQueue()
        self._buffers = 0

    def pieces(self, tensor: torch.Tensor) -> Iterator[Piece]:
        """All bytes of a contiguous tensor, in order.

        Whoever asks for the next waits until there is a buffer for it: pieces are used meanwhile,
        by other threads.
        """
        data = tensor.detach().reshape(-1).view(torch.uint8)
        for offset in range(0, data.numel(), PIECE_BYTES):
            part = data[offset : offset + PIECE_BYTES]
            yield (
                self._staged(offset, part)
                if part.is_cuda
                else Piece(offset, part.numel(), part, _nothing, _nothing)
            )

    def _staged(self, offset: int, part: torch.Tensor) -> Piece:
        buffer = self._buffer()
        copy = buffer[: part.numel()]
        copy.copy_(part, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(part.device))
        return Piece(offset, part.numel(), copy, copied.synchronize, lambda: self._free.put(buffer))

    def _buffer(self) -> torch.Tensor:
        if self._free.empty() and self._buffers < BUFFERS:
            self._buffers += 1
            return torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        return self._free.get()


def _nothing() -> None:
    """A CPU's tensor is there, and stays."""
