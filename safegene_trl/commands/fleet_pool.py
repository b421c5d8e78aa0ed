"""The processes of a fleet, as many at once as the memory allows."""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ..errors import SafeGeneError
from ..interruption import Interrupted, undisturbed
from ..provenance import sha256_of_file
from ..step.decision import EXIT_CODES
from .fleet_file import Fleet
from .fleet_member import FAILED, INTERRUPTED, Member, newest_report, save_state
from .process_tree import ProcessTree


logger = logging.getLogger(__name__)
SHARE_OF_FREE_MEMORY = 0.8
GIB = 2**30
_END_OF_LOG = 2**16  # bytes in which a process's last words are looked for


class Pool:
    """Processes on devices, as many at once as the memory allows."""

    def __init__(
        self, fleet: Fleet, members: Sequence[Member], state: Path, lock: int | None = None
    ):
        self.fleet, self.members, self.state = fleet, members, state
        self.inherited = (
            [] if lock is None else [lock]
        )  # so that no second fleet starts while a process of a killed one runs
        free = free_memory()
        budget = fleet.memory_gib
        self.room = {
            name: budget * GIB if budget else SHARE_OF_FREE_MEMORY * memory
            for name, memory in free.items()
        }
        self.at_once = fleet.processes or (
            len(members) if "cpu" not in free else os.cpu_count() or 1
        )
        self.running: dict[ProcessTree, tuple[Member, str, float]] = {}

    def run(self) -> None:
        waiting = [member for member in self.members if not member.outcome]
        largest = max(self.room.values())
        for member in waiting:
            if member.memory > largest:
                need, have = member.memory / GIB, largest / GIB
                member.finish(
                    FAILED,
                    f"It needs about {need:.1f} GiB and the budget is {have:.1f} GiB: raise `memory_gib`.",
                )
        waiting = sorted((m for m in waiting if not m.outcome), key=lambda member: -member.memory)
        try:
            while waiting or self.running:
                for member in list(waiting):
                    device = next(
                        (name for name, room in self.room.items() if room >= member.memory), None
                    )
                    if device is not None and len(self.running) < self.at_once:
                        waiting.remove(member)
                        self._start(member, device)
                self._collect()
                time.sleep(0.2)
        except BaseException as error:
            with undisturbed():
                self._give_up(error)
            raise
        save_state(self.members, self.state)

    def _start(self, member: Member, device: str) -> None:
        environment = dict(os.environ)
        if device == "cpu":
            environment.setdefault(
                "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_once))
            )
            # glibc would keep as much again of what tensors no longer need, beyond what was
            # estimated
            environment.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
        else:
            environment["CUDA_VISIBLE_DEVICES"] = device
        command = [sys.executable, "-m", "safegene_trl", "apply", "--config", str(member.recipe)]
        # a process that was started and not noted would never be ended
        with undisturbed(later=True):
            try:
                process = ProcessTree(command, member.log, environment, self.inherited)
            except OSError as error:
                member.finish(FAILED, f"It cannot be started: {error}.")
                return
            self.room[device] -= member.memory
            self.running[process] = member, device, time.monotonic()
        logger.info("%s: started", member.name)

    def _collect(self) -> None:
        for process, (member, device, started) in list(self.running.items()):
            code = process.poll()
            late = code is None and time.monotonic() - started > self.fleet.timeout_minutes * 60
            if code is None and not late:
                continue
            if late:
                ProcessTree.end([process])
            del self.running[process]
            self.room[device] += member.memory
            member.seconds = round(time.monotonic() - started, 1)
            if code is None:
                member.finish(
                    FAILED,
                    f"It took longer than {self.fleet.timeout_minutes:g} minutes and was ended.",
                )
            else:
                conclude(member, code)
            save_state(self.members, self.state)

    def _give_up(self, error: BaseException) -> None:
        """Ends all that runs and notes it."""
        ProcessTree.end(list(self.running))
        why = error.signal if isinstance(error, Interrupted) else type(error).__name__
        for member, _, started in self.running.values():
            member.seconds = round(time.monotonic() - started, 1)
            member.finish(
                INTERRUPTED,
                f"The fleet was ended ({why}) while it was at work: run the fleet again.",
            )
        with suppress(SafeGeneError):  # the disk may be what ended it
            save_state(self.members, self.state)


def free_memory() -> dict[str, float]:
    """Bytes by device, under the name that CUDA_VISIBLE_DEVICES takes for it."""
    count = torch.cuda.device_count()
    visible = [
        name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()
    ]
    names = visible[:count] if len(visible) >= count else [str(gpu) for gpu in range(count)]
    free = {name.strip(): float(torch.cuda.mem_get_info(gpu)[0]) for gpu, name in enumerate(names)}
    return free or {"cpu": float(psutil.virtual_memory().available)}


def conclude(member: Member, code: int) -> None:
    """What became of a member whose process has ended: as its exit code says, if its report says so
    too.
    """
    outcome = next((name for name, number in EXIT_CODES.items() if number == code), FAILED)
    if outcome != FAILED:
        place, report = newest_report(member.target, outcome)
        if place is not None:
            member.report = sha256_of_file(place)
            return member.finish(outcome, str(report["decision"].get("reason", "")))
        return member.finish(
            FAILED, f"It ended as {outcome.replace('_', ' ')} and left no report: see {member.log}."
        )
    if code < 0:
        name = {each.value: each.name for each in signal.Signals}.get(-code, f"signal {-code}")
        hint = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        return member.finish(FAILED, f"It was ended by {name}{hint}: see {member.log}.")
    said = next(
        (line for line in reversed(_last_lines(member.log)) if line.startswith("safegene apply:")),
        "",
    )
    member.finish(
        FAILED,
        said.removeprefix("safegene apply: ")
        or f"It ended with exit code {code}: see {member.log}.",
    )


def _last_lines(log: Path) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(-min(_END_OF_LOG, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
