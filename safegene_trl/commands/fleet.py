"""`safegene apply --fleet models.yaml`: one vector, many finished fine-tunes, in parallel processes
within a memory budget.
"""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..checkpoints.locking import alone_in
from ..checkpoints.output import MARKER, replace_file
from ..checkpoints.places import failure_path
from ..errors import ConfigError, SafeGeneError
from ..interruption import Interrupted, undisturbed
from ..provenance import sha256_of_file, sha256_of_json
from ..step.decision import EXIT_CODES
from ..text import one_line, read_json, strict_json
from .fleet_file import Fleet, overlap, sources, target_of
from .fleet_folder import STATE, WORKSHOP
from .process_tree import ProcessTree
from .tables import aligned, headings, measured_cells
from .yaml_files import as_yaml


__all__ = ["Fleet", "run_fleet"]
logger = logging.getLogger(__name__)
FAILED, INTERRUPTED = "failed", "interrupted"
SHARE_OF_FREE_MEMORY = 0.8
_GIB = 2**30
_END_OF_LOG = 2**16  # bytes in which a process's last words are looked for


@dataclass
class Member:
    """One fine-tune on its way through the fleet.

    Attributes:
        memory: Bytes that its process will take, as estimated.
        key: Hash of all that its result depends on; a finished one with the same key is not done
            again.
        report: SHA-256 of the report of a finished one, which says whether what lies there is still
            that.
        outcome: One of the gate's, `failed`, or `interrupted`; empty before it was started.
        seconds: How long its process took, in whichever run that was.
        done_before: Whether that was an earlier run, whose result is still good.
    """

    name: str
    recipe: Path
    target: Path
    key: str
    memory: int = 0
    report: str = ""
    outcome: str = ""
    message: str = ""
    seconds: float = 0.0
    done_before: bool = False

    @property
    def log(self) -> Path:
        return self.recipe.with_suffix(".log")

    def finish(self, outcome: str, message: str) -> None:
        self.outcome, self.message = outcome, message


def run_fleet(path: Path) -> int:
    """Does all that is not done yet, prints a table, and returns the exit code of the worst
    outcome: 2 for one that failed.

    Raises:
        SafeGeneError: The file is wrong, or another fleet is at work in its folder; nothing is
            started then.
    """
    fleet = Fleet.read(path)
    folder = Path(fleet.output_dir)
    remedy = "wait for it, or end it and the processes that it left"
    with alone_in(folder / WORKSHOP, "fleet", remedy) as lock:
        before = _read_state(folder / STATE)
        members = [_member(fleet, entry, before) for entry in fleet.models]
        _estimate([member for member in members if not member.outcome])
        _save_state(members, folder / STATE)
        _Pool(fleet, members, folder / STATE, lock).run()
    print(_table(members))
    outcomes = {member.outcome for member in members}
    return 2 if FAILED in outcomes else max(EXIT_CODES[outcome] for outcome in outcomes)


def _member(fleet: Fleet, entry: dict[str, Any], before: Mapping[str, dict[str, Any]]) -> Member:
    name, recipe = fleet.name_of(entry), fleet.recipe(entry)
    file = Path(fleet.output_dir) / WORKSHOP / f"{name}.yaml"
    replace_file(file, as_yaml(recipe))
    target = target_of(recipe)
    # what it reads from its own folder, e.g. for a warm start, changes with its result
    inputs = [
        _stamps(source) for source in sources(recipe).values() if not overlap(Path(source), target)
    ]
    member = Member(name, file, target, sha256_of_json([recipe, inputs]))
    earlier = before.get(name, {})
    if earlier.get("key") == member.key and earlier.get("outcome") in EXIT_CODES:
        place, _ = _report(target, earlier["outcome"])
        if place is not None and sha256_of_file(place) == earlier.get("report"):
            member.report, member.seconds, member.done_before = (
                earlier["report"],
                earlier["seconds"],
                True,
            )
            member.finish(earlier["outcome"], earlier["message"])
    return member


def _stamps(source: str) -> list[Any]:
    """What tells whether a file or folder was written to since; of a hub id its name."""
    place = Path(source)
    files = sorted(place.glob("*")) if place.is_dir() else [place]
    return [
        source,
        [
            [file.name, file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
            if file.is_file()
        ],
    ]


def _estimate(members: Sequence[Member]) -> None:
    """Memory of every member; those whose settings or files are wrong fail here, before anything is
    started.
    """
    from .estimate import estimate_apply

    for member in members:
        try:
            costs = estimate_apply(["--config", str(member.recipe)], timed=False)
            member.memory = max(cost.memory for cost in costs.values())
        except SafeGeneError as error:
            member.finish(FAILED, one_line(error))
        except Interrupted:
            raise
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever is wrong with one model, the others are done; argparse exits
            logger.exception("%s: the estimate failed", member.name)
            member.finish(FAILED, f"Its estimate failed: {type(error).__name__}: {one_line(error)}")


class _Pool:
    """Processes on devices, as many at once as the memory allows."""

    def __init__(
        self, fleet: Fleet, members: Sequence[Member], state: Path, lock: int | None = None
    ):
        self.fleet, self.members, self.state = fleet, members, state
        self.inherited = (
            [] if lock is None else [lock]
        )  # so that no second fleet starts while a process of a killed one runs
        free = _free_memory()
        budget = fleet.memory_gib
        self.room = {
            name: budget * _GIB if budget else SHARE_OF_FREE_MEMORY * memory
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
                need, have = member.memory / _GIB, largest / _GIB
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
        _save_state(self.members, self.state)

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
                _conclude(member, code)
            _save_state(self.members, self.state)

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
            _save_state(self.members, self.state)


def _free_memory() -> dict[str, float]:
    """Bytes by device, under the name that CUDA_VISIBLE_DEVICES takes for it."""
    count = torch.cuda.device_count()
    visible = [
        name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()
    ]
    names = visible[:count] if len(visible) >= count else [str(gpu) for gpu in range(count)]
    free = {name.strip(): float(torch.cuda.mem_get_info(gpu)[0]) for gpu, name in enumerate(names)}
    return free or {"cpu": float(psutil.virtual_memory().available)}


def _conclude(member: Member, code: int) -> None:
    """What became of a member whose process has ended: as its exit code says, if its report says so
    too.
    """
    outcome = next((name for name, number in EXIT_CODES.items() if number == code), FAILED)
    if outcome != FAILED:
        place, report = _report(member.target, outcome)
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


def _report(target: Path, outcome: str) -> tuple[Path | None, dict[str, Any]]:
    """The newest report of a member with that outcome, and where it stands; a rejected one may have
    written no checkpoint.
    """
    found = []
    for place in [target / MARKER, *([failure_path(target)] if outcome == "rejected" else [])]:
        with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
            report = read_json(place.read_text(encoding="utf-8"))
            if report["decision"]["outcome"] == outcome:
                found.append((place.stat().st_mtime_ns, place, report))
    return max(found, key=lambda entry: entry[0])[1:] if found else (None, {})


def _table(members: Sequence[Member]) -> str:
    rows = [["model", "outcome", *headings(), "seconds", "output"]]
    for member in members:
        place, report = (
            _report(member.target, member.outcome) if member.outcome in EXIT_CODES else (None, {})
        )
        output = str(member.target) if place == member.target / MARKER else ""
        measured = measured_cells(report.get("measured") or {})
        seconds = "already done" if member.done_before else f"{member.seconds:.0f}"
        rows.append([member.name, member.outcome, *measured, seconds, output])
    notes = [
        f"{m.name}: {one_line(m.message)}"
        for m in members
        if m.outcome not in ("accepted", "accepted_best_effort")
    ]
    return "\n".join([aligned(rows), *notes])


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = read_json(path.read_text(encoding="utf-8"))
        for entry in entries:
            texts = [entry[key] for key in ("name", "key", "outcome", "message")]
            if not all(isinstance(text, str) for text in texts) or not math.isfinite(
                entry["seconds"]
            ):
                raise ValueError(entry)
        return {entry["name"]: entry for entry in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SafeGeneError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: remove it, and the fleet starts anew.") from error


def _save_state(members: Sequence[Member], path: Path) -> None:
    entries = [
        {key: str(v) if isinstance(v, Path) else v for key, v in asdict(member).items()}
        for member in members
    ]
    replace_file(path, strict_json(entries, indent=1) + "\n")
