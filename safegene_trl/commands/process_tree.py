"""A child process that is ended with everything it has started."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


GRACE = 10.0  # seconds from SIGTERM to SIGKILL


class ProcessTree:
    """A command in a process group of its own, its output in a file.

    Args:
        command: Program and arguments.
        log: File for what it prints.
        environment: All its variables.
        inherited: Open files that it is given, e.g. a lock that it then holds until it ends.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        inherited: Sequence[int] = (),
    ):
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                pass_fds=tuple(inherited),
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit code, None while it runs. What it has left running in its group is ended."""
        # unreaped, so that the group's number stays its own
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if (
            self._process.returncode is None
            and os.waitid(os.P_PID, self._process.pid, ended) is None
        ):
            return None
        return self._reaped()

    @staticmethod
    def end(groups: Sequence["ProcessTree"]) -> None:
        """Ends all of them: by SIGTERM, and what is left of them after `GRACE` seconds by SIGKILL."""
        members = [process for group in groups for process in group._members()]
        _signal(members, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while time.monotonic() < until and any(_is_alive(process) for process in members):
            time.sleep(0.05)
        # what they have started meanwhile as well
        _signal(
            [*members, *(process for group in groups for process in group._members())],
            signal.SIGKILL,
        )
        for group in groups:
            group._reaped()

    def _reaped(self) -> int:
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _members(self) -> list[psutil.Process]:
        """The process and its descendants, those with groups of their own among them."""
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
