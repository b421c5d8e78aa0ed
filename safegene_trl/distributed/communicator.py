"""The processes of a job: what one tells all the others, what is added up over them, and how they
fail together.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..errors import CalibrationDataError, PeerError, SafeGeneError


_MESSAGE_BYTES = 2048
_TURNS = itertools.count()  # of `Communicator.on_main_rank`, the same on every rank


def _together(error: Exception) -> Exception:
    """Marks an error as one that every rank raises, so that all of them can go on after it."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


class Communicator:
    """This process among those of its job; alone, every operation is the identity.

    Args:
        device: Where this rank computes, and exchanges tensors.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def least(self, number: int) -> int:
        """Collective: the smallest of all ranks' whole numbers."""
        own = torch.zeros(self.world_size, dtype=torch.long)
        own[self.rank] = number
        return int(self.sum(own).min())

    def share(self, count: int) -> list[int | None]:
        """Which of `count` items this rank works on; as many on every rank, None where one has to
        mark time.
        """
        return [
            i if i < count else None for i in range(self.rank, self._padded(count), self.world_size)
        ]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Collective: the sum over ranks, on the CPU."""
        if self.world_size == 1:
            return tensor.cpu()
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Collective: rank 0's values of a tensor that has one shape everywhere, on the CPU."""
        return self.sum(tensor if self.is_main else torch.zeros_like(tensor))

    def _broadcast_flag(self, flag: bool) -> bool:
        """Collective: rank 0's yes or no."""
        return bool(self.broadcast(torch.tensor([int(flag)])).item())

    def broadcast_text(self, text: str) -> str:
        """Collective: rank 0's text, of any length."""
        own = torch.tensor(list(text.encode()) if self.is_main else [], dtype=torch.uint8)
        (size,) = self.broadcast(torch.tensor([len(own)])).tolist()
        return bytes(self.broadcast(own if self.is_main else own.new_zeros(size)).tolist()).decode()

    def gather_texts(self, texts: Sequence[str]) -> list[str]:
        """Collective: texts of which every rank has its share and empty ones in the others' places."""
        if self.world_size == 1:
            return list(texts)
        message = json.dumps(list(texts)).encode()
        sizes = torch.zeros(self.world_size, dtype=torch.long)
        sizes[self.rank] = len(message)
        rows = self._exchange(message, int(self.sum(sizes).max()))
        return ["".join(parts) for parts in zip(*map(json.loads, rows), strict=True)]

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """Collective at its end: all ranks leave the block well, or every rank raises.

        Inside go things that can fail on one rank alone: files, shapes, data. No collective
        operation may be inside.

        Raises:
            SafeGeneError: This rank's own error; or `PeerError`, naming the rank and the cause, if
                another's was a `SafeGeneError`.
            RuntimeError: Another rank failed with any other error.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.world_size > 1:
            self._raise_for_peers(failure)
        if failure is not None:
            raise failure

    @contextmanager
    def on_main_rank(self) -> Iterator[bool]:
        """Collective at its end: rank 0 works in the block, which gets True there, and the others
        wait as long as it takes.

        For what may take longer than a collective operation may wait: hashing a large checkpoint,
        an upload. The others look at the process group's store, so that no operation's time-out
        runs. If it fails every rank raises, as with `raising_together`.
        """
        failure: Exception | None = None
        try:
            yield self.is_main
        except Exception as error:
            failure = error
        if self.world_size > 1:
            self._wait_for_main()
            self._raise_for_peers(failure)
        if failure is not None:
            raise failure

    def _wait_for_main(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        key = f"safegene/{next(_TURNS)}"
        if self.is_main:
            store.set(key, "done")
        else:
            while not store.check([key]):
                time.sleep(0.05)

    @contextmanager
    def naming_rank(self) -> Iterator[None]:
        """Adds to every error that leaves the block which rank it was on."""
        try:
            yield
        except Exception as error:
            if self.world_size > 1:
                error.add_note(f"SafeGene: this was rank {self.rank} of {self.world_size}.")
            raise

    def check_same(self, what: str, text: str) -> None:
        """Collective: raises `CalibrationDataError` on every rank unless all have the same `text`."""
        if self.world_size == 1:
            return
        digests = self._exchange(hashlib.sha256(text.encode()).hexdigest().encode())
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise CalibrationDataError(
                f"Rank {odd[0]} has other {what} than rank 0: give every rank the same files, and a `data.task_data` file if the "
                "training set differs from rank to rank."
            )

    def _padded(self, count: int) -> int:
        return -(-count // self.world_size) * self.world_size

    def _raise_for_peers(self, failure: Exception | None) -> None:
        prefix = b"" if failure is None else b"s" if isinstance(failure, SafeGeneError) else b"x"
        cause = (
            ""
            if failure is None
            else str(failure)
            if prefix == b"s"
            else f"{type(failure).__name__}: {failure}"
        )
        messages = self._exchange(prefix + cause.encode())
        failed = [rank for rank, message in enumerate(messages) if message]
        if failure is None and failed:
            message = messages[failed[0]].decode(errors="replace")
            text = f"Rank {failed[0]} of {self.world_size} failed: {message[1:]}"
            raise PeerError(text) if message.startswith("s") else _together(RuntimeError(text))
        if failure is not None:
            _together(failure)

    def _exchange(self, message: bytes, size: int = _MESSAGE_BYTES) -> list[bytes]:
        """Collective: every rank's message, cut to `size` bytes."""
        row = torch.zeros(size, dtype=torch.uint8)
        cut = message[:size]
        row[: len(cut)] = torch.tensor(list(cut), dtype=torch.uint8)
        own = row.to(self.device)
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own)
        return [bytes(row.tolist()).rstrip(b"\0") for row in rows]
