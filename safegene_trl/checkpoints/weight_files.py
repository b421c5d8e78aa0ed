"""The weight files of a checkpoint to be, each complete on the disk soon after its last tensor."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch

from .checkpoint_folder import CheckpointFolder
from .staging import Piece, Staging
from .tensor_file import TensorFile


AT_ONCE = 2  # files that wait for the disk while others are written
WRITERS = 4  # threads: one alone is slower than a fast disk
IN_FLIGHT_BYTES = 2**28  # of tensors on their way into files, beside the last


class WeightFiles:
    """Opens weight files, and finishes each while the next ones are written. Other threads write
    what they are given: the next tensor can be worked out meanwhile.

    No more than `AT_ONCE` of them wait for the disk: who waited for all of them at the end would
    keep other ranks waiting past their time-out. What they hold goes into `folder.digests`.

    Args:
        folder: Where they go.
        contents: Data type and shape of every tensor, by name.
    """

    def __init__(self, folder: CheckpointFolder, contents: Mapping[str, Any]):
        self.plan = folder.lay_out(contents)
        self._folder, self._contents = folder, contents
        self._file_of = {name: file for file, names in self.plan.items() for name in names}
        self._missing = {file: set(names) for file, names in self.plan.items()}
        self._open: dict[str, TensorFile] = {}
        self._closing: deque[tuple[str, Future[str]]] = deque()
        self._threads = ThreadPoolExecutor(AT_ONCE)
        self._writers, self._staging = ThreadPoolExecutor(WRITERS), Staging()
        self._writes: dict[str, list[Future[None]]] = {file: [] for file in self.plan}
        self._in_flight: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._open.values():
            file.give_up()
        self._writers.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)
        for file in self._open.values():
            file.drop()

    def open(self, file_name: str) -> TensorFile:
        """One of the files of the plan, whose tensors may now be written."""
        if file_name not in self._open:
            contents = {name: self._contents[name] for name in self.plan[file_name]}
            self._open[file_name] = TensorFile(self._folder.path / file_name, contents)
        return self._open[file_name]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Has a whole, contiguous tensor written, and its file finished if it was the last one.

        It must stay as it is until the files are complete.
        """
        file_name = self._file_of[name]
        file = self.open(file_name)
        for piece in self._staging.pieces(tensor):
            written = self._writers.submit(_write, file, name, piece)
            self._writes[file_name].append(written)
            self._in_flight.append((written, piece.size))
        self._wait_for_writers()
        self._missing[file_name].discard(name)
        if not self._missing[file_name]:
            self.finish(file_name)

    def _wait_for_writers(self) -> None:
        """Until little enough is on its way."""
        waiting = sum(size for _, size in self._in_flight)
        while self._in_flight and (waiting > IN_FLIGHT_BYTES or self._in_flight[0][0].done()):
            written, size = self._in_flight.popleft()
            written.result()
            waiting -= size

    def finish(self, file_name: str) -> None:
        """All of a file is written, or on its way: another thread waits for the disk."""
        file, writes = self.open(file_name), self._writes.pop(file_name)
        self._closing.append((file_name, self._threads.submit(_close, file, writes)))
        while len(self._closing) > AT_ONCE:
            self._wait_for_first()

    def complete(self) -> None:
        """Returns when the disk has all finished files."""
        while self._closing:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        file_name, closing = self._closing.popleft()
        self._folder.digests[file_name] = closing.result()
        del self._open[file_name]


def _write(file: TensorFile, name: str, piece: Piece) -> None:
    with piece.in_memory() as data:
        file.write(name, data, piece.offset)


def _close(file: TensorFile, writes: list[Future[None]]) -> str:
    for written in writes:
        written.result()
    return file.close()
