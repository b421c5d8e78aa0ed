"""Which cells come first, and how long one may take: for machines that are there for minutes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .families import FIRST, Family, device
from .tasks import TASKS, fine_tune_folder, is_trained


Cell = tuple[str, int, str]  # task, seed, method
TASKS_FIRST = ("poisoned", "sst2", "alpaca")
METHODS_FIRST = ("aligned", "fine-tuned", "SafeGene")
METHODS_NEXT = ("few-shot LoRA", "uniform λ")


def ordered(cells: Iterable[Cell]) -> list[Cell]:
    """The most informative first, task by task; otherwise in the order given.

    Ours beside the models it is held against, on three kinds of fine-tunes; then its plainest
    rivals there; both on the other tasks; on the other seeds; then all other methods, seed by seed.
    """
    given = list(cells)
    tasks = sorted({task for task, *_ in given}, key=lambda task: _place(task, TASKS_FIRST))

    def key(cell: Cell) -> tuple[int, int, int]:
        task, seed, method = cell
        among_first = task in TASKS_FIRST and seed == 0
        if method in METHODS_FIRST or method in METHODS_NEXT:
            late = 0 if method in METHODS_FIRST else 1
            tier = late if among_first else 2 if seed == 0 else 3
        else:
            tier = 4
        return tier, seed, tasks.index(task)

    return sorted(given, key=key)


def _place(task: str, first: Sequence[str]) -> tuple[int, int]:
    known = list(TASKS)
    return (0, first.index(task)) if task in first else (1, known.index(task))


@dataclass(frozen=True)
class Budget:
    """Minutes that a run may take, since a time on the clock (`time.monotonic`, seconds)."""

    minutes: float
    started: float

    def spent(self, now: float) -> float:
        """Minutes."""
        return (now - self.started) / 60

    def allows(self, seconds: float, now: float) -> bool:
        """Whether that many more fit."""
        return now - self.started + seconds <= 60 * self.minutes


def expected_seconds(cell: Cell, found: Mapping[str, Mapping[str, Any]], family: Family) -> float:
    """What a cell will take, by the records of this family on this kind of device.

    By those of its method on its task, else of its method, else of any; 0 where there is none, so
    that a first one is tried. A fine-tune that is not there yet counts as the longest one that was
    trained.

    Args:
        cell: Task, seed and method.
        found: Records of cells by name.
        family: Whose cell it is.
    """
    task, seed, method = cell
    own = [
        record
        for record in found.values()
        if record.get("family", FIRST) == family.name
        and record.get("device", "cpu") == device().type
        and record.get("scale", 1.0) == 1.0
    ]
    like = [record for record in own if record["method"] == method]
    nearest = [record for record in like if record["task"] == task] or like or own
    if not nearest:
        return 0.0
    seconds = median(
        record["seconds"] + record["method_seconds"] + record["about"].get("measuring_seconds", 0.0)
        for record in nearest
    )
    if method != "aligned" and not is_trained(fine_tune_folder(TASKS[task], seed, family)):
        seconds += max(record.get("training_seconds", 0.0) for record in own)
    return seconds
