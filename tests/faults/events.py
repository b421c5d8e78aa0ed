"""The points at which a run can be broken: every opening, making, renaming, writing, flushing and
removing of a file, by name.

An event's *site* is what it does to what, without tokens and numbers, so that it is the same in
every run; a fault is the n-th event at a site. Phases are told from a run without a fault: the
inode that is the target in the end is looked for beside it.
"""

import errno
import json
import mmap
import os
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reader import whole
from .world import World


AUDITED = {
    "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
    "shutil.rmtree", "shutil.copyfile", "shutil.move", "fcntl.flock",
}  # fmt: skip
WRAPPED = ("write", "pwrite", "fsync")  # of `os`: Python announces none of these
# what they do comes as events of its own
ANNOUNCEMENTS = (
    "shutil.rmtree",
    "shutil.copyfile",
    "shutil.move",
)
PHASES = ("before saving", "saving", "renaming", "after")
KINDS = (
    "SIGKILL", "SIGTERM", "SIGINT", "EIO", "ENOSPC", "EROFS", "EFBIG", "short writes",
    "vector replaced", "vector overwritten", "vector truncated",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# a temporary folder or an earlier one on its way out
_BESIDE = re.compile(r"results/[^/ ]*[._]TARGET")
_plain = {name: getattr(os, name) for name in WRAPPED}


@dataclass(frozen=True)
class Event:
    """One event: its name, its site, the place it is about, and whether it changes something there."""

    name: str
    site: str
    place: str
    changes: bool


def install(
    world: World,
    job: str,
    act: Callable[[Event], None],
    after: Callable[[Event], None] = lambda event: None,
) -> None:
    """In the child: calls `act` before every event from now on, `after` after a flush. Their own
    events are none.
    """
    busy = False

    def call(function: Callable[[Event], None], event: Event) -> None:
        nonlocal busy
        if not busy:
            busy = True
            try:
                function(event)
            finally:
                busy = False

    def hook(name: str, arguments: tuple) -> None:
        if name in AUDITED and not busy:
            call(act, _event(world, job, name, arguments))

    def wrapped(name: str) -> Callable[..., Any]:
        def function(descriptor: int, *rest: Any) -> Any:
            event = _event(world, job, f"os.{name}", (descriptor,))
            call(act, event)
            if SHORT and name != "fsync" and len(rest[0]) > 1:
                rest = (rest[0][: len(rest[0]) // 2], *rest[1:])
            done = _plain[name](descriptor, *rest)
            if name == "fsync":
                call(after, event)
            return done

        return function

    for name in WRAPPED:
        setattr(os, name, wrapped(name))
    sys.addaudithook(hook)


SHORT: list[bool] = []  # holds something where writes are to write half of what they are given


def _event(world: World, job: str, name: str, arguments: tuple) -> Event:
    places = [
        _place(value)
        for value in arguments[: 2 if name in ("os.rename", "os.link", "shutil.move") else 1]
    ]
    # within an open folder, as `shutil.rmtree` does it
    if name in ("os.remove", "os.rmdir") and arguments[1] >= 0:
        places = [os.path.join(_place(arguments[1]), os.fsdecode(arguments[0]))]
    changes = name not in ("os.fsync", "fcntl.flock")
    if name == "open":
        changes = isinstance(arguments[2], int) and bool(arguments[2] & _WRITING)
    site = " → ".join(_site(world, job, place) for place in places)
    return Event(
        name,
        f"{name}{' for writing' if name == 'open' and changes else ''}: {site}",
        places[0],
        changes,
    )


def _place(value: Any) -> str:
    if isinstance(value, int):
        try:
            return os.readlink(f"/proc/self/fd/{value}")
        except OSError:
            return ""
    return (
        os.path.abspath(os.fsdecode(value)) if isinstance(value, str | bytes | os.PathLike) else ""
    )


def _site(world: World, job: str, place: str) -> str:
    if not place.startswith(f"{world.root}/"):
        return "elsewhere"
    place = place.removeprefix(f"{world.root}/").removesuffix(" (deleted)")
    top, *rest = (
        place.removeprefix("results/").split("/") if place.startswith("results/") else ("",)
    )
    for target in world.targets(job):
        marked = re.sub(rf"(?:^|(?<=[._])){target.name}(?=[._]|$)", "TARGET", top)
        if marked != top:
            place = "/".join(("results", marked, *rest))
            break
    return re.sub(
        r"\d+", "N", re.sub(r"[0-9a-f]{6,}|(?<=[._-])[a-z0-9_]{8}(?=[._/-]|$)", "#", place)
    )


@dataclass(frozen=True)
class Trace:
    """A run without a fault: its sites by phase, each with how often it came, and what was wrong on
    the way.
    """

    sites: dict[str, Counter]
    wrong: list[str]


def trace(
    world: World,
    job: str,
    run: Callable[[Callable[[], None]], int | None],
    allowed: list[dict[str, str]],
) -> Trace:
    """Runs a job of one target and looks at the target before every event.

    Args:
        world: Its output is as it is to be at the start.
        job: Any but the fleet, whose members' events are those of `apply`.
        run: Runs the job in a child with a preparation.
        allowed: What the target may be at any moment; where it is there at the start it must never
            be absent.
    """
    (target,) = world.targets(job)
    log, there = world.root / "events", target.exists()
    log.unlink(missing_ok=True)

    def prepare() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        flushed: dict[int, int] = {}
        last = [target.stat().st_ino if there else None]

        def act(event: Event) -> None:
            inode = target.stat().st_ino if target.exists() else None
            near = (
                {entry.name: entry.inode() for entry in os.scandir(world.output)}
                if world.output.is_dir()
                else {}
            )
            line: dict[str, Any] = {"site": event.site, "inode": inode, "near": near, "wrong": []}
            if inode is None and there:
                line["wrong"].append("absent once there")
            if (
                inode is not None
                and event.place.startswith(str(world.root))
                and whole(target) not in allowed
            ):
                line["wrong"].append("mixed")
            if inode not in (None, last[0]):
                late = [
                    path
                    for path in (target, *target.rglob("*"))
                    if flushed.get(path.stat().st_ino) != path.stat().st_mtime_ns
                ]
                line["wrong"] += [
                    f"not flushed before it was renamed: {'folder' if path.is_dir() else 'file'}"
                    for path in late
                ]
            last[0] = inode
            _plain["write"](descriptor, json.dumps(line).encode() + b"\n")

        def after(event: Event) -> None:
            status = os.stat(event.place) if os.path.exists(event.place) else None
            if status is not None:
                flushed[status.st_ino] = status.st_mtime_ns

        install(world, job, act, after)

    run(prepare)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return _phases(lines, target)


def _phases(lines: list[dict[str, Any]], target: Path) -> Trace:
    final = target.stat().st_ino
    present = [final in line["near"].values() for line in lines]
    # the event that makes the folder
    saving = next(i for i in reversed(range(len(lines))) if not present[i])
    changed = next(i for i, line in enumerate(lines) if i > saving and line["inode"] == final)
    gone = [i for i in range(saving, changed) if lines[i]["inode"] != lines[saving]["inode"]]
    renaming = min([changed, *gone]) - 1
    flushes = [
        i for i, line in enumerate(lines) if i >= changed and line["site"] == "os.fsync: results"
    ]
    beside = [i for i, line in enumerate(lines) if i >= changed and _BESIDE.search(line["site"])]
    end = max([changed, *flushes, *beside])
    sites: dict[str, Counter] = {phase: Counter() for phase in PHASES}
    for i, line in enumerate(lines):
        phase = (
            PHASES[0]
            if i < saving
            else PHASES[1]
            if i < renaming
            else PHASES[2]
            if i <= end
            else PHASES[3]
        )
        sites[phase][line["site"]] += 1
    wrong = sorted({word for line in lines for word in line["wrong"]})
    return Trace(sites, wrong if flushes else [*wrong, "folder not flushed after the renaming"])


class Strike:
    """One fault in a child and all its children: at the n-th event of a site, once; some go on from
    there.

    Args:
        number: Which of the events of the site, from 1, in whichever process.
        whom: Who gets a signal: the `parent` that was started, or the process that the event is in.
    """

    def __init__(self, world: World, job: str, kind: str, site: str, number: int, whom: str):
        self.world, self.job, self.kind, self.site, self.number, self.whom = (
            world,
            job,
            kind,
            site,
            number,
            whom,
        )
        self.shared = mmap.mmap(-1, mmap.PAGESIZE)
        self.parent = 0

    @property
    def hit(self) -> bool:
        return bool(self.shared[0])

    def prepare(self) -> None:
        self.parent, seen, struck = os.getpid(), 0, False
        # from the start: whichever file is written must be written on
        if self.kind == "short writes":
            SHORT.append(True)

        def act(event: Event) -> None:
            nonlocal seen, struck
            seen += event.site == self.site
            if seen == self.number and event.site == self.site and not struck and not self.hit:
                self.shared[0], struck = 1, True
                self._strike(event)
            elif struck:
                self._go_on(event)

        install(self.world, self.job, act)

    def _strike(self, event: Event) -> None:
        if self.kind.startswith("SIG"):
            os.kill(
                self.parent if self.whom == "parent" else os.getpid(), signal.Signals[self.kind]
            )
        elif self.kind == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        elif self.kind == "EFBIG":  # by the system itself, whoever writes
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        elif self.kind.startswith("vector"):
            self._change_vector()
        elif self.kind != "short writes":
            self._go_on(event)

    def _go_on(self, event: Event) -> None:
        """A full or read-only disk stays so."""
        if self.kind not in ("ENOSPC", "EROFS") or not event.changes or event.name in ANNOUNCEMENTS:
            return
        # a full disk still lets go of files
        grows = event.name in (
            "open",
            "os.mkdir",
            "os.write",
            "os.pwrite",
            "os.link",
            "os.symlink",
            "os.truncate",
        )
        if event.place.startswith(f"{self.world.output}/") and (grows or self.kind == "EROFS"):
            code = getattr(errno, self.kind)
            raise OSError(code, os.strerror(code))

    def _change_vector(self) -> None:
        """Another valid vector takes the vector's place, its files renamed over it or overwritten;
        or they are cut.
        """
        vector = self.world.vector
        for file in self.world.other.iterdir():
            if self.kind == "vector truncated":
                os.truncate(vector / file.name, 0)
            elif self.kind == "vector overwritten":
                shutil.copyfile(file, vector / file.name)
            else:
                shutil.copyfile(file, vector / f"{file.name}.new")
                (vector / f"{file.name}.new").rename(vector / file.name)
