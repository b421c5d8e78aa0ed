"""Which faults are run, and what is right after each."""

import ctypes
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safegene_trl.errors import SafeGeneError
from safegene_trl.step.history import read_history

from .events import KINDS, PHASES, Strike, Trace, trace
from .reader import Reader
from .world import (
    CRASHED,
    HANGS_AFTER,
    JOBS,
    Reference,
    World,
    contents,
    finished,
    fork,
    run,
    wait,
    weights,
)


WHERE_IT_HURTS = ("saving", "renaming")
IN_THE_MIDDLE = 3  # of every so many faults one is elsewhere
WEIGHTS = {"apply": 5, "coefficients": 4, "sft": 2, "fleet": 1}  # a run of a fleet takes longest
WRONG = (
    "absent once there", "mixed", "not flushed before it was renamed: file", "not flushed before it was renamed: folder",
    "folder not flushed after the renaming", "earlier checkpoint lost", "half-written checkpoint", "fine-tune changed",
    "vector changed", "history damaged", "hang", "success without the checkpoint", "failed without a fault", "no plain error",
    "exit code wrong", "signal swallowed", "short write not written on", "temporaries left", "no failure report",
    "plain fine-tune lost", "processes left running", "second run did not complete", "something left behind",
)  # fmt: skip
FAILURES = (2,)  # exit codes of a SafeGeneError
ENDED_BY = {"SIGTERM": (128 + 15, -15), "SIGINT": (128 + 2, -2), "SIGKILL": (-9,)}


@dataclass(frozen=True)
class Fault:
    """One fault: the `number`-th event at `site` in a run of `job`; `whom`: for a fleet, the
    process that a signal goes to.
    """

    job: str
    kind: str
    phase: str
    site: str
    number: int
    replaces: bool
    whom: str


class Suite:
    """Everything that a fault is held against, made once."""

    def __init__(self, root: Path, jobs: tuple[str, ...] = JOBS):
        self.world, self.jobs = World(root), jobs
        ctypes.CDLL(None).prctl(
            36, 1, 0, 0, 0
        )  # orphans of a run become children of this process, so that they are seen
        self.world.warm_up(jobs)
        self.references: dict[str, Reference] = {}
        self.earlier: dict[str, list[dict[str, str]]] = {}
        for job in jobs:
            self.references[job] = self.world.reference(job)
            self.earlier[job] = self._earlier(job)
        self.with_other = {job: self._with_other(job) for job in jobs}
        self.model, self.wrong = contents(self.world.model), Counter[str]()
        self.traces = {
            (job, replaces): self._trace(job, replaces)
            for job in jobs
            if job != "fleet"
            for replaces in (False, True)
        }

    def _earlier(self, job: str) -> list[dict[str, str]]:
        """The checkpoints of a run that has just ended as earlier ones, told from their successors
        by their config.
        """
        place = self.world.root / f"earlier-{job}"
        found = []
        for target in self.world.targets(job):
            shutil.copytree(target, place / target.name)
            config = place / target.name / "config.json"
            config.write_text(config.read_text() + "\n")
            found.append(contents(place / target.name))
        return found

    def _with_other(self, job: str) -> list[dict[str, str]]:
        self.world.clear()
        for file in self.world.other.iterdir():
            shutil.copyfile(file, self.world.vector / file.name)
        code = run(self.world.command(job), lambda: None)
        found = [contents(target) for target in self.world.targets(job)]
        self.world.restore_vector()
        if not all(found):
            raise RuntimeError(f"{job} ended with {code} with another vector")
        return found

    def _put_earlier(self, job: str) -> None:
        for target in self.world.targets(job):
            shutil.copytree(self.world.root / f"earlier-{job}" / target.name, target)

    def _trace(self, job: str, replaces: bool) -> Trace:
        self.world.clear()
        if replaces:
            self._put_earlier(job)
        allowed = [*self.references[job].targets, *(self.earlier[job] if replaces else [])]
        found = trace(
            self.world, job, lambda prepare: run(self.world.command(job), prepare), allowed
        )
        self.wrong.update(found.wrong)
        return found

    def sites(self, phase: str) -> dict[str, list[tuple[str, bool]]]:
        """The sites of a phase, each with the jobs it occurs in, without and with an earlier
        checkpoint.
        """
        found: dict[str, list[tuple[str, bool]]] = {}
        for (job, replaces), traced in self.traces.items():
            for site in traced.sites[phase]:
                found.setdefault(site, []).append((job, replaces))
                if job == "apply" and "fleet" in self.jobs:
                    found[site].append(("fleet", replaces))
        return found

    def choose(self, count: int, seed: int) -> Iterator[Fault]:
        """Two of three in saving and renaming, its sites in turn; the others anywhere."""
        random_ = random.Random(seed)
        hurts = [(phase, site) for phase in WHERE_IT_HURTS for site in sorted(self.sites(phase))]
        random_.shuffle(hurts)
        hurt = 0
        for number in range(count):
            if number % IN_THE_MIDDLE:
                phase, site = hurts[hurt % len(hurts)]
                # all but those of the vector, which is read by then
                kind = KINDS[(hurt + hurt // len(hurts)) % 8]
                hurt += 1
            else:
                phase = random_.choice([PHASES[0], PHASES[0], *PHASES])
                site = random_.choice(sorted(self.sites(phase)))
                kind = KINDS[number // IN_THE_MIDDLE % len(KINDS)]
            jobs = self.sites(phase)[site]
            job, replaces = random_.choices(jobs, [WEIGHTS[job] for job, _ in jobs])[0]
            counts = self.traces["apply" if job == "fleet" else job, replaces].sites
            before = sum(counts[earlier][site] for earlier in PHASES[: PHASES.index(phase)])
            whom = random_.choice(["parent", "member"]) if job == "fleet" else "parent"
            yield Fault(
                job,
                kind,
                phase,
                site,
                before + random_.randint(1, counts[phase][site]),
                replaces,
                whom,
            )

    def examine(self, fault: Fault) -> dict[str, Any]:
        """Runs the job with the fault, and once more without; what was wrong."""
        world, job = self.world, fault.job
        world.clear()
        if fault.replaces:
            self._put_earlier(job)
        reference, earlier = self.references[job], self.earlier[job]
        others = self.with_other[job] if fault.kind.startswith("vector") else reference.targets
        allowed = [
            [new, other, *([old] if fault.replaces else [])]
            for new, other, old in zip(reference.targets, others, earlier, strict=True)
        ]
        strike = Strike(world, job, fault.kind, fault.site, fault.number, fault.whom)
        command = world.command(job)
        with ExitStack() as looking:
            readers = [
                looking.enter_context(Reader(target, good))
                for target, good in zip(world.targets(job), allowed, strict=True)
            ]
            child = fork(lambda: _command(command), strike.prepare)
            code = wait(child, HANGS_AFTER)
            left_running = _end_orphans({reader.child for reader in readers}, fault)
        wrong = [word for reader in readers for word in reader.wrong]
        wrong += ["processes left running"] if left_running else []
        for target, good in zip(world.targets(job), allowed, strict=True):
            if not target.exists():
                wrong += ["earlier checkpoint lost"] if fault.replaces else []
            elif not finished(target) or contents(target) not in good:
                wrong.append("half-written checkpoint")
        wrong += self._after(fault, code, strike.hit, others)
        world.restore_vector()
        wrong += self._again(fault)
        return {**asdict(fault), "code": code, "hit": strike.hit, "wrong": sorted(set(wrong))}

    def _after(
        self, fault: Fault, code: int | None, hit: bool, others: list[dict[str, str]]
    ) -> list[str]:
        """What else is wrong with what a run with a fault left."""
        world, job, reference = self.world, fault.job, self.references[fault.job]
        wrong = ["fine-tune changed"] if contents(world.model) != self.model else []
        vector = {file.name: file.read_bytes() for file in world.vector.iterdir()}
        if vector != world.vector_files and not fault.kind.startswith("vector"):
            wrong.append("vector changed")
        try:
            read_history(world.history)
        except SafeGeneError:
            wrong.append("history damaged")
        if code is None:
            return [*wrong, "hang"]
        succeeded = code == reference.code or (
            fault.kind.startswith("vector") and code in (0, 3, 4)
        )
        there = [contents(target) for target in world.targets(job) if target.exists()]
        if succeeded and any(found not in (*reference.targets, *others) for found in there):
            wrong.append("success without the checkpoint")
        if succeeded and len(there) < len(reference.targets):
            wrong.append("success without the checkpoint")
        if not hit:
            return wrong if succeeded else [*wrong, "failed without a fault"]
        if code == CRASHED:  # outside the safety step an error of the trainer is the trainer's own
            wrong += ["no plain error"] if job != "sft" or fault.phase in WHERE_IT_HURTS else []
        elif not succeeded and code not in (*FAILURES, *ENDED_BY.get(fault.kind, ())):
            wrong.append("exit code wrong")
        in_place = fault.phase in WHERE_IT_HURTS and job != "fleet"
        if in_place and succeeded and fault.kind in ENDED_BY:
            wrong.append("signal swallowed")
        if fault.kind == "short writes" and not succeeded:
            wrong.append("short write not written on")
        unfinished = [
            path.name
            for path in world.output.iterdir()
            if path.is_dir() and path.name not in reference.listing
        ]
        could_clear = (
            fault.phase == "saving"
            and job != "fleet"
            and fault.kind in ("SIGTERM", "SIGINT", "EIO", "EFBIG")
        )
        if (
            could_clear and not succeeded and unfinished
        ):  # later, what is left of the earlier folder may stay for the next run
            wrong.append("temporaries left")
        told = world.output.joinpath("safeguarded.failed.json").is_file()
        if in_place and not succeeded and fault.kind in ("SIGTERM", "SIGINT", "EIO") and not told:
            wrong.append("no failure report")
        if in_place and job == "sft":
            saved = [
                weights(folder) for folder in (world.output, *world.output.glob("checkpoint-*"))
            ]
            wrong += [] if reference.plain in saved else ["plain fine-tune lost"]
        return wrong

    def _again(self, fault: Fault) -> list[str]:
        """What is wrong after a second run, without a fault."""
        world, job, reference = self.world, fault.job, self.references[fault.job]
        # the next run would start at this one's coefficients; a fleet would not do again what it
        # has done
        for path in world.output.iterdir():
            if (
                path.name.startswith((world.history.name, f".{world.history.name}"))
                and path.is_file()
            ):
                path.unlink()
        code = run(world.command(job), lambda: None)
        right = code == reference.code and all(map(finished, world.targets(job)))
        found = [contents(target) for target in world.targets(job)]
        expected = [
            [new, old] if job == "fleet" else [new]
            for new, old in zip(reference.targets, self.with_other[job], strict=True)
        ]
        right = right and all(one in good for one, good in zip(found, expected, strict=True))
        wrong = [] if right else ["second run did not complete"]
        left = {path.name for path in world.output.iterdir()} ^ reference.listing
        return wrong + (["something left behind"] if left else [])


def _command(words: list[str]) -> int:
    from safegene_trl.commands.main import main

    return main(words)


def _end_orphans(own: set[int], fault: Fault) -> bool:
    """Waits for processes that a run left behind and ends them; whether there were some that it had
    to end itself.

    A run that was killed outright cannot end its children, one that was told to end must.
    """
    seconds = HANGS_AFTER if fault.kind == "SIGKILL" else 1.0
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    deadline = time.monotonic() + seconds
    while orphans := {int(pid) for pid in children.read_text().split()} - own:
        for pid in orphans:
            os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        if time.monotonic() > deadline:
            return True
        time.sleep(0.005)
    return False


def summary(suite: Suite, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of what went wrong, all of which must be 0, and of what was hit."""
    hit = [one for one in found if one["hit"]]
    in_place = Counter(
        f"{one['phase']}: {one['site']}" for one in hit if one["phase"] in WHERE_IT_HURTS
    )
    sites = [f"{phase}: {site}" for phase in WHERE_IT_HURTS for site in suite.sites(phase)]
    wrong = Counter(word for one in found for word in one["wrong"])
    return {
        "faults": len(hit),
        "not_reached": len(found) - len(hit),
        "phases": {phase: sum(one["phase"] == phase for one in hit) for phase in PHASES},
        "kinds": dict(Counter(one["kind"] for one in hit)),
        "jobs": dict(Counter(one["job"] for one in hit)),
        "sites_of_saving": len(sites),
        "fewest_hits_of_a_site_of_saving": min((in_place[site] for site in sites), default=0),
        "wrong": dict(sorted(wrong.items())),
        "wrong_without_a_fault": dict(sorted(suite.wrong.items())),
        "details": [one for one in found if one["wrong"]],
        "hits_of_saving": dict(sorted(in_place.items())),
    }
