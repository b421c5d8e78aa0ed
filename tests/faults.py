"""Breaks the safety step at random points and looks at what is left: `python -m tests.faults --count 1000 --record FILE`.

Every fault has a seed. A child process, forked from this one so that nothing has to be imported anew, runs `safegene apply` on a tiny model
and is killed, refused its files or given another vector at a random event (a file opened, made, renamed, written to, removed) or a random
time. Then the output must be the finished checkpoint or none, the fine-tune untouched, an earlier checkpoint not lost, and
a second run must complete and leave nothing else behind.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from safegene_trl import checkpoint
from safegene_trl.commands.main import main as safegene
from safegene_trl.errors import SafeGeneError
from safegene_trl.gate import EXIT_CODES
from safegene_trl.history import read_history
from safegene_trl.history_file import seal_path
from safegene_trl.output import MARKER
from safegene_trl.provenance import software_versions

from .conftest import make_model, make_tokenizer, make_vector, task_dataset


KINDS = ("killed at an event", "killed at a time", "disk full", "read-only", "vector replaced", "vector overwritten")
HANGS_AFTER = 60.0  # seconds
CRASHED = 99  # exit code of a run that ends by an exception which is no SafeGeneError
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "fcntl.flock"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class World:
    """The files of one fault: a fine-tune, a vector, task data, and where the checkpoint is to go."""

    def __init__(self, root: Path):
        self.root = root
        self.model, self.vector, self.other = root / "model", root / "vector", root / "other-vector"
        self.output = root / "results"
        self.target = self.output / "safeguarded"
        tokenizer, model = make_tokenizer(), make_model()
        model.save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        make_vector(model, tokenizer).save_pretrained(self.vector)
        make_vector(model, tokenizer, seed=8).save_pretrained(self.other)
        self.history = self.output / "history.jsonl"
        self.task = root / "task.jsonl"
        self.task.write_text("".join(json.dumps(row) + "\n" for row in task_dataset()))

    def command(self) -> list[str]:
        settings = {"vector": self.vector, "task_data": self.task, "output_dir": self.target, "max_evaluations": 2}
        settings |= {"num_safety_shots": 4, "num_task_shots": 4, "num_benign_shots": 0, "num_test_prompts": 1}
        settings |= {"max_new_tokens": 1, "max_utility_loss": 1000.0, "utility_weight": 0.0}
        settings |= {"history": self.history}
        # whether a random vector helps is chance: every outcome is written
        settings |= {"gate.max_incoherent": 0.0, "gate.write_rejected": "true", "max_shard_size": "20KB"}
        return [
            "apply",
            "--model_name_or_path",
            str(self.model),
            *(f"--safegene.{k}={v}" for k, v in settings.items()),
        ]


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all that decides what a checkpoint is; its reports hold times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(Path(MARKER).stem)
    }


def finished(folder: Path) -> bool:
    """Whether it is a checkpoint with its report."""
    try:
        return json.loads((folder / MARKER).read_text())["status"] == "safeguarded"
    except (OSError, ValueError, KeyError):
        return False


def run(command: list[str], prepare: Callable[[], None], kill_after: float | None = None) -> int | None:
    """The command in a child process; its exit code, negative for a signal, None for a hang (it is ended then)."""
    child = os.fork()
    if child == 0:
        code = CRASHED
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            if not os.environ.get("FAULTS_DEBUG"):
                os.dup2(silence, 2)
            prepare()
            code = safegene(command)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    started = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - started
        if elapsed > HANGS_AFTER or (kill_after is not None and elapsed > kill_after):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None if elapsed > HANGS_AFTER else -signal.SIGKILL
        time.sleep(0.002)


def at_event(number: int, act: Callable[[str, tuple], None]) -> None:
    """In the child: calls `act` at every event from the given one on, with its name and arguments."""
    seen = 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in EVENTS or name == "safegene.write":
            seen += 1
            if seen >= number:
                act(name, arguments)

    sys.addaudithook(hook)
    plain = os.pwrite

    def pwrite(*arguments):
        sys.audit("safegene.write", "")
        return plain(*arguments)

    checkpoint.os.pwrite = pwrite


def count_events(command: list[str], root: Path) -> int:
    """How many events a run without a fault has."""
    tally = root / "events"

    def note() -> None:
        descriptor = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        at_event(1, lambda *event: os.write(descriptor, b"."))

    run(command, note)
    return tally.stat().st_size


def refuse(code: int, root: Path) -> Callable[[str, tuple], None]:
    """Every change below `root` fails from now on."""

    def act(name: str, arguments: tuple) -> None:
        if name in ("shutil.rmtree", "fcntl.flock"):
            return  # announcements; what they do comes as events of its own
        if name == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & _WRITING
        else:
            changes = code == errno.EROFS or name in (
                "safegene.write",
                "os.mkdir",
            )  # a full disk still lets go of files
        place = os.fspath(arguments[0]) if arguments and isinstance(arguments[0], str | os.PathLike) else ""
        if changes and (name == "safegene.write" or str(place).startswith(str(root))):
            raise OSError(code, os.strerror(code))

    return act


def once(act: Callable[[], None]) -> Callable[[str, tuple], None]:
    done = []

    def hook(name: str, arguments: tuple) -> None:
        if not done:
            done.append(True)
            act()

    return hook


def replace(world: World, in_place: bool) -> None:
    """Another valid vector takes the vector's place: its files one by one renamed over it, or overwritten."""
    for file in world.other.iterdir():
        if in_place:
            shutil.copyfile(file, world.vector / file.name)
        else:
            shutil.copyfile(file, world.vector / f"{file.name}.new")
            (world.vector / f"{file.name}.new").rename(world.vector / file.name)


def faults(kind: str, world: World, random_: random.Random, events: int, seconds: float) -> int | None:
    """One run with a fault; its exit code."""
    number = random_.randrange(1, events + 1)
    if kind == "killed at a time":
        return run(world.command(), lambda: None, kill_after=random_.uniform(0, seconds))
    acts = {
        "killed at an event": lambda name, arguments: os.kill(os.getpid(), signal.SIGKILL),
        "disk full": refuse(errno.ENOSPC, world.output),
        "read-only": refuse(errno.EROFS, world.output),
        "vector replaced": once(lambda: replace(world, in_place=False)),
        "vector overwritten": once(lambda: replace(world, in_place=True)),
    }
    return run(world.command(), lambda: at_event(number, acts[kind]))


def suite(count: int, seed: int, root: Path) -> dict:
    """Runs the faults; counts of what went wrong, all of which must be 0, and of how the runs with a fault ended."""
    world = World(root)
    vector = {file.name: file.read_bytes() for file in world.vector.iterdir()}
    ends_with = run(world.command(), lambda: None)  # fills the caches, too
    assert ends_with in EXIT_CODES.values() and finished(world.target), f"exit code {ends_with} without a fault"
    shutil.rmtree(world.output)
    started = time.monotonic()
    events = count_events(world.command(), root)
    seconds = time.monotonic() - started
    first = contents(world.target)
    plain_model = contents(world.model)
    earlier = root / "earlier"
    shutil.copytree(world.target, earlier)
    (earlier / "config.json").write_text(
        (earlier / "config.json").read_text() + "\n"
    )  # told from its successor by this
    earlier_contents = contents(earlier)
    with_other = _reference_with_other(world, vector)
    wrong: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    details = []
    for number in range(count):
        random_ = random.Random(f"{seed}-{number}")
        kind = KINDS[number % len(KINDS)]
        shutil.rmtree(world.output, ignore_errors=True)
        world.output.mkdir()
        replaces = random_.random() < 0.5
        if replaces:
            shutil.copytree(earlier, world.target)
        code = faults(kind, world, random_, events, seconds)
        ends[f"{kind}: {'hang' if code is None else 'killed' if code < 0 else f'exit code {code}'}"] += 1
        found = _look(world, replaces, first, with_other if "vector" in kind else first, earlier_contents)
        found += ["fine-tune changed"] if contents(world.model) != plain_model else []
        found += ["hang"] if code is None else []
        found += ["no plain error"] if code == CRASHED else []
        try:
            read_history(world.history)
        except SafeGeneError:
            found.append("history damaged")
        world.history.unlink(missing_ok=True)  # the next run would start at this one's coefficients
        seal_path(world.history).unlink(missing_ok=True)
        for name, data in vector.items():
            (world.vector / name).write_bytes(data)
        again = run(world.command(), lambda: None)
        if again != ends_with or contents(world.target) != first or not finished(world.target):
            found.append("second run did not complete")
        left = sorted(
            path.name
            for path in world.output.iterdir()
            if path.name not in ("safeguarded", "history.jsonl", "history.jsonl.seal")
        )
        if left:
            found.append("something left behind")
        wrong.update(found)
        if found:
            details.append(
                {"number": number, "kind": kind, "replaces": replaces, "code": code, "wrong": found, "left": left}
            )
    return {
        "faults": count,
        "seed": seed,
        "events_in_a_run": events,
        "lost_checkpoints": wrong["earlier checkpoint lost"],
        "half_written_accepted": wrong["half-written checkpoint"],
        "fine_tunes_changed": wrong["fine-tune changed"],
        "hangs": wrong["hang"],
        "second_runs_failed": wrong["second run did not complete"],
        "left_behind": wrong["something left behind"],
        "histories_damaged": wrong["history damaged"],
        "crashes": wrong["no plain error"],
        "ends": dict(sorted(ends.items())),
        "details": details,
    }


def _reference_with_other(world: World, vector: dict[str, bytes]) -> dict[str, str]:
    """The checkpoint that the other vector gives."""
    replace(world, in_place=True)
    run(world.command(), lambda: None)
    found = contents(world.target)
    for name, data in vector.items():
        (world.vector / name).write_bytes(data)
    return found


def _look(world: World, replaces: bool, *good: dict[str, str]) -> list[str]:
    """What is wrong with what a fault left; `good`: contents that a finished checkpoint may have, the earlier one's last."""
    *new, earlier = good
    if world.target.exists():
        allowed = [*new, earlier] if replaces else new
        return [] if finished(world.target) and contents(world.target) in allowed else ["half-written checkpoint"]
    aside = [path for path in world.output.iterdir() if path.suffix == ".old"]
    if replaces and not any(contents(path) == earlier for path in aside):
        return ["earlier checkpoint lost"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # tqdm's own lock is a semaphore that all forked processes share: a child killed while it holds it would block the others
    tqdm.set_lock(threading.RLock())
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = str(Path(place) / "cache")
        result = suite(arguments.count, arguments.seed, Path(place))
        result |= {"seconds": round(time.monotonic() - started), "software": software_versions()}
        text = json.dumps(result, indent=1)
        print(text)
        if arguments.record:
            arguments.record.write_text(text + "\n")
        return int(bool(result["details"]))


if __name__ == "__main__":
    raise SystemExit(main())
