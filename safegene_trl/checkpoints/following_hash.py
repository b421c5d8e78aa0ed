"""The hash of a file that is being written, which is ready soon after the file."""

import hashlib
import os
import threading
from concurrent.futures import Future
from contextlib import suppress


_PIECE = 2**23  # bytes that are read at a time


class FollowingHash:
    """SHA-256 of a file, taken by a thread that follows those who write it, in the order of its
    bytes.

    What was hashed the disk is to begin with, so that little is left when the file is synced.

    Args:
        descriptor: The file, open for reading; it stays open until `finish` or `stop` returns.
        size: How many bytes it will have.
    """

    def __init__(self, descriptor: int, size: int):
        self._descriptor, self._size = descriptor, size
        self._written: dict[int, int] = {}  # beginnings and ends of what is written beyond
        self._end = 0  # all before it is written
        self._complete = self._stopped = False
        self._changed = threading.Condition()
        self._digest: Future[str] = Future()
        # a daemon: an interpreter that ends by an error does not wait for it
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def written(self, first: int, end: int) -> None:
        """Bytes `first` to `end` (not included) are written, and will not be again."""
        with self._changed:
            self._written[first] = end
            while self._end in self._written:
                self._end = self._written.pop(self._end)
            self._changed.notify()

    def finish(self) -> str:
        """The hash, in hex, of the file as it is now; waits for it."""
        with self._changed:
            self._complete = True  # what nobody has written are zeros
            self._changed.notify()
        return self._digest.result()

    def stop(self) -> None:
        """Ends the thread; there will be no hash."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._digest.set_result(self._follow())
        except BaseException as error:  # raised where the hash is asked for
            self._digest.set_exception(error)

    def _follow(self) -> str:
        digest, position = hashlib.sha256(), 0
        piece = memoryview(bytearray(min(_PIECE, self._size)))
        while position < self._size and not self._stopped:
            with self._changed:
                while self._end == position and not (self._complete or self._stopped):
                    self._changed.wait()
                end = self._size if self._complete else self._end
            if end == position:
                continue
            count = os.preadv(self._descriptor, [piece[: end - position]], position)
            if count == 0:
                raise OSError("a weight file became shorter while it was written")
            digest.update(piece[:count])
            self._send_to_disk(position, count)
            position += count
        if position < self._size:
            raise OSError("a weight file was given up before all of it was hashed")
        return digest.hexdigest()

    def _send_to_disk(self, position: int, count: int) -> None:
        """Has Linux begin to write it, without waiting; elsewhere the sync at the end does it all."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._descriptor, position, count, os.POSIX_FADV_DONTNEED)
