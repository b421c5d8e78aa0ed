"""`safegene apply --fleet models.yaml`: one vector, many finished fine-tunes, in parallel processes within a memory budget."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from ..config import reject_unknown_keys
from ..errors import ConfigError, SafeGeneError
from ..gate import EXIT_CODES
from ..output import MARKER, replace_file
from ..provenance import sha256_of_json
from ..step.plan import failure_path
from .tables import HEADINGS, aligned, measured_cells


logger = logging.getLogger(__name__)
STATE = "fleet.json"
FAILED = "failed"
SHARE_OF_FREE_MEMORY = 0.8
_GIB = 2**30


@dataclass
class Fleet:
    """The content of `models.yaml`.

    Args:
        output_dir: Folder for everything: `NAME/` with each checkpoint, `NAME.log`, and `fleet.json`.
        models: One block per fine-tune: `name` (default: the last part of its path), the options of `safegene apply`, and a `safegene`
            block of its own, which goes before the common one.
        safegene: The common block; keys of `SafeGeneConfig`.
        memory_gib: Memory for all processes together: of each GPU where there are any, else of the machine. Default: 80 % of what is
            free.
        processes: How many at once, at most. Default: as many as memory allows on GPUs, else one per core.
        timeout_minutes: A process that takes longer is ended, and its fine-tune counts as failed.
    """

    output_dir: str
    models: list[dict[str, Any]]
    safegene: dict[str, Any] = field(default_factory=dict)
    memory_gib: float | None = None
    processes: int | None = None
    timeout_minutes: float = 24 * 60.0

    @classmethod
    def read(cls, path: Path) -> "Fleet":
        """Raises `ConfigError` for a file that cannot be read, unknown keys, or names that are missing or there twice."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"The fleet {path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"The fleet {path} must hold keys and values.")
        reject_unknown_keys(content, [f.name for f in fields(cls)], where=f"the fleet {path}")
        if not content.get("output_dir") or not isinstance(content.get("models"), list) or not content["models"]:
            raise ConfigError(f"The fleet {path} needs `output_dir` and a list of `models`.")
        fleet = cls(**content)
        names = [fleet.name_of(member) for member in fleet.models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"The fleet has two models named {twice[0]}: give each a `name`.")
        for key in ("memory_gib", "processes", "timeout_minutes"):
            value = getattr(fleet, key)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"`{key}` is {value!r}: it must be a number above 0.")
        return fleet

    def name_of(self, member: Any) -> str:
        if not isinstance(member, dict) or not member.get("model_name_or_path"):
            raise ConfigError("Every entry of `models` needs `model_name_or_path`.")
        name = str(member.get("name", Path(member["model_name_or_path"]).name))
        if name != Path(name).name or name.startswith("."):
            raise ConfigError(f"`{name}` cannot be a folder's name: give the model another `name`.")
        return name

    def recipe(self, member: dict[str, Any]) -> dict[str, Any]:
        """The recipe of `safegene apply` for one model."""
        own = {key: value for key, value in member.items() if key not in ("name", "safegene")}
        target = str(Path(self.output_dir) / self.name_of(member))
        return own | {"safegene": {"output_dir": target, **self.safegene, **(member.get("safegene") or {})}}


@dataclass
class Member:
    """One fine-tune on its way through the fleet.

    Attributes:
        memory: Bytes that its process will take, as estimated.
        key: Hash of all that its result depends on; a finished one with the same key is not done again.
    """

    name: str
    recipe: Path
    target: Path
    key: str
    memory: int = 0
    outcome: str = ""
    message: str = ""
    seconds: float = 0.0

    def finish(self, outcome: str, message: str) -> None:
        self.outcome, self.message = outcome, message


def run_fleet(path: Path) -> int:
    """Does all that is not done yet, prints a table, and returns the exit code of the worst outcome: 2 for one that failed."""
    fleet = Fleet.read(path)
    folder = Path(fleet.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    before = _read_state(folder / STATE)
    members = [_member(fleet, entry, before) for entry in fleet.models]
    _estimate([member for member in members if not member.outcome])
    _save_state(members, folder / STATE)
    _Pool(fleet, members, folder / STATE).run()
    print(_table(members))
    outcomes = {member.outcome for member in members}
    return 2 if FAILED in outcomes else max(EXIT_CODES[outcome] for outcome in outcomes)


def _member(fleet: Fleet, entry: dict[str, Any], before: Mapping[str, dict[str, Any]]) -> Member:
    name, recipe = fleet.name_of(entry), fleet.recipe(entry)
    file = Path(fleet.output_dir) / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    target = Path(recipe["safegene"]["output_dir"])
    inputs = [_stamps(str(source)) for source in (entry["model_name_or_path"], recipe["safegene"].get("vector", ""))]
    member = Member(name, file, target, sha256_of_json([recipe, inputs]))
    earlier = before.get(name, {})
    if earlier.get("key") == member.key and earlier.get("outcome") in EXIT_CODES:
        written = (target / MARKER).is_file() or (earlier["outcome"] == "rejected" and failure_path(target).is_file())
        if written:
            member.seconds = earlier["seconds"]
            member.finish(earlier["outcome"], earlier["message"])
    return member


def _stamps(source: str) -> list[Any]:
    """What tells whether a folder was written to since; of a hub id its name."""
    folder = Path(source)
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    return [source, [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]]


def _estimate(members: Sequence[Member]) -> None:
    """Memory of every member; those whose settings or files are wrong fail here, before anything is started."""
    from .estimate import estimate_apply

    for member in members:
        try:
            costs = estimate_apply(["--config", str(member.recipe)], timed=False)
            member.memory = max(cost.memory for cost in costs.values())
        except SafeGeneError as error:
            member.finish(FAILED, str(error))
        except Exception as error:  # whatever is wrong with one model, the others are done
            logger.exception("%s: the estimate failed", member.name)
            member.finish(FAILED, f"Its estimate failed: {type(error).__name__}: {error}")


class _Pool:
    """Processes on devices, as many at once as the memory allows."""

    def __init__(self, fleet: Fleet, members: Sequence[Member], state: Path):
        self.fleet, self.members, self.state = fleet, members, state
        gpus = range(torch.cuda.device_count())
        if gpus:
            free = {str(gpu): torch.cuda.mem_get_info(gpu)[0] for gpu in gpus}
        else:
            free = {"cpu": psutil.virtual_memory().available}
        budget = fleet.memory_gib
        self.room = {name: budget * _GIB if budget else SHARE_OF_FREE_MEMORY * memory for name, memory in free.items()}
        self.at_once = int(fleet.processes or (len(members) if gpus else os.cpu_count() or 1))
        self.running: dict[subprocess.Popen, tuple[Member, str, float]] = {}

    def run(self) -> None:
        waiting = [member for member in self.members if not member.outcome]
        largest = max(self.room.values())
        for member in waiting:
            if member.memory > largest:
                need, have = member.memory / _GIB, largest / _GIB
                member.finish(
                    FAILED, f"It needs about {need:.1f} GiB and the budget is {have:.1f} GiB: raise `memory_gib`."
                )
        waiting = sorted((m for m in waiting if not m.outcome), key=lambda member: -member.memory)
        try:
            while waiting or self.running:
                for member in list(waiting):
                    device = next((name for name, room in self.room.items() if room >= member.memory), None)
                    if device is not None and len(self.running) < self.at_once:
                        waiting.remove(member)
                        self._start(member, device)
                self._collect()
                time.sleep(0.2)
        finally:
            for process in self.running:
                process.kill()
            _save_state(self.members, self.state)

    def _start(self, member: Member, device: str) -> None:
        environment = dict(os.environ)
        if device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_once)))
            # glibc would keep as much again of what tensors no longer need, beyond what was estimated
            environment.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
        else:
            environment["CUDA_VISIBLE_DEVICES"] = device
        command = [sys.executable, "-m", "safegene_trl", "apply", "--config", str(member.recipe)]
        with open(member.recipe.with_suffix(".log"), "wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )
        self.room[device] -= member.memory
        self.running[process] = member, device, time.monotonic()
        logger.info("%s: started", member.name)

    def _collect(self) -> None:
        for process, (member, device, started) in list(self.running.items()):
            late = time.monotonic() - started > self.fleet.timeout_minutes * 60
            if late:
                process.kill()
                process.wait()
            elif process.poll() is None:
                continue
            del self.running[process]
            self.room[device] += member.memory
            member.seconds = round(time.monotonic() - started, 1)
            if late:
                member.finish(FAILED, f"It took longer than {self.fleet.timeout_minutes:g} minutes and was ended.")
            else:
                member.finish(*_outcome(member, process.returncode))
            _save_state(self.members, self.state)


def _outcome(member: Member, code: int) -> tuple[str, str]:
    outcome = next((name for name, number in EXIT_CODES.items() if number == code), FAILED)
    log = member.recipe.with_suffix(".log")
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if outcome == FAILED:
        said = next((line for line in reversed(lines) if line.startswith("safegene apply:")), "")
        return FAILED, said.removeprefix("safegene apply: ") or f"It ended with exit code {code}: see {log}."
    return outcome, str(_report(member)["decision"]["reason"])


def _report(member: Member) -> dict[str, Any]:
    path = member.target / MARKER if member.outcome != "rejected" else failure_path(member.target)
    for file in (path, member.target / MARKER, failure_path(member.target)):
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return {"decision": {"reason": ""}}


def _table(members: Sequence[Member]) -> str:
    rows = [["model", "outcome", *HEADINGS, "seconds", "output"]]
    for member in members:
        measured = {} if member.outcome == FAILED else _report(member).get("measured", {})
        output = str(member.target) if (member.target / MARKER).is_file() and member.outcome != FAILED else ""
        rows.append([member.name, member.outcome, *measured_cells(measured), f"{member.seconds:.0f}", output])
    notes = [f"{m.name}: {m.message}" for m in members if m.outcome not in ("accepted", "accepted_best_effort")]
    return "\n".join([aligned(rows), *notes])


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SafeGeneError(f"{path} is damaged: remove it, and the fleet starts anew.") from error


def _save_state(members: Sequence[Member], path: Path) -> None:
    entries = [{key: str(v) if isinstance(v, Path) else v for key, v in asdict(member).items()} for member in members]
    replace_file(path, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
