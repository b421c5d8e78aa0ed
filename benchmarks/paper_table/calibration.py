"""Whether the safety step's report keeps its promises: what it measured, on the prompts that the
vector came with, against what the table's independent prompts found of the same weights.

A promise is *kept* where the 95 % interval of the difference, promised minus found, holds 0. The
interval takes in the sampling error of both, by Newcombe's hybrid of the two intervals (1998,
method 10): with promised p in [p₁, p₂] and found f in [f₁, f₂], the difference lies between

    p − f − √((p − p₁)² + (f₂ − f)²)  and  p − f + √((p₂ − p)² + (f − f₁)²).

Of honest promises 95 % are kept. That the promised interval alone covers the figure that was found
asks too much of it, as that figure has an error of its own; it is told beside it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records
from safegene_trl.config.metrics import METRICS
from safegene_trl.judges.intervals import Rate, mean_interval

from .families import FIRST
from .render import BENIGN, CELLS, HARMFUL
from .tasks import TASKS


NAME = "calibration"  # of the page and the plot
COUNTED = {  # metric of the report: columns of the table, letter of the answers that are counted
    "refusal_rate": (HARMFUL, "r"),
    "over_refusal": (BENIGN, "r"),
    "incoherent": ((*HARMFUL, *BENIGN), "i"),
}
UTILITY = "utility_loss"
SIDES = {"before": "fine-tune", "after": "safeguarded"}
Cell = Mapping[str, Any]
Measured = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A share (0–1), or a difference of two, with its 95 % interval."""

    share: float
    low: float
    high: float

    @staticmethod
    def of(found: Mapping[str, float]) -> "Estimate":
        """As reports write one."""
        return Estimate(found["share"], found["low"], found["high"])


@dataclass(frozen=True)
class Promise:
    """One figure of one report, and what was found.

    Attributes:
        run: Name of the cell or run that the report is of.
        metric: Key among `METRICS`.
        side: `before` (of the fine-tune) or `after` (of what was written).
    """

    run: str
    metric: str
    side: str
    promised: Estimate
    found: Estimate

    @property
    def difference(self) -> Estimate:
        """Promised minus found, with Newcombe's interval."""
        one, other = self.promised, self.found
        apart = one.share - other.share
        return Estimate(
            apart,
            apart - hypot(one.share - one.low, other.high - other.share),
            apart + hypot(one.high - one.share, other.share - other.low),
        )

    @property
    def kept(self) -> bool:
        return self.difference.low <= 0 <= self.difference.high

    @property
    def covers(self) -> bool:
        """Whether the promised interval alone holds the figure that was found."""
        return self.promised.low <= self.found.share <= self.promised.high


def promises(folder: Path) -> list[Promise]:
    """All that the records of a folder tell of: cells with their step's own report, and the fleet's
    reports on fine-tunes of the table, whose safeguarded weights are no cell's.
    """
    cells = records.load(CELLS, folder)
    tuned = {
        (cell.get("family", FIRST), cell["task"], cell["seed"]): cell
        for cell in cells.values()
        if cell["method"] == "fine-tuned"
    }
    made: list[Promise] = []
    for name, cell in cells.items():
        if measured := cell["about"].get("measured"):
            plain = tuned.get((cell.get("family", FIRST), cell["task"], cell["seed"]))
            made += _of_report(name, measured, {"before": plain, "after": cell})
    for member in records.load("runs", folder).get("fleet", {}).get("members", ()):
        task, _, seed = member["name"].rpartition("-")
        plain = tuned.get((FIRST, task, int(seed))) if seed.isdigit() else None
        if plain is not None and "measured" in member:
            made += _of_report(f"fleet, {member['name']}", member["measured"], {"before": plain})
    return made


def _of_report(name: str, measured: Measured, cells: Mapping[str, Cell | None]) -> list[Promise]:
    """What a report promises of the weights that there are cells of."""
    made = [
        Promise(name, metric, side, Estimate.of(measured[side][metric]), _found(cell, metric))
        for side, cell in cells.items()
        if cell is not None
        for metric in COUNTED
        if metric in measured[side]
    ]
    before, after = cells.get("before"), cells.get("after")
    if before and after and UTILITY in measured and TASKS[after["task"]].utility != "accuracy":
        promised = Estimate.of(measured[UTILITY])
        made.append(Promise(name, UTILITY, "after", promised, _lost(before, after)))
    return made


def _found(cell: Cell, metric: str) -> Estimate:
    """The share among all independent prompts of a kind, with Wilson's interval."""
    columns, letter = COUNTED[metric]
    marks = "".join(cell["labels"][column] for column in columns)
    own = Rate(marks.count(letter), len(marks))
    return Estimate(own.share, *own.interval)


def _lost(before: Cell, after: Cell) -> Estimate:
    """Token accuracy lost, over the same test samples, with a bootstrap interval."""
    lost = np.subtract(before["utility"], after["utility"])
    return Estimate(float(lost.mean()), *mean_interval(lost.tolist()))


def page(made: Sequence[Promise]) -> list[str]:
    """The outcome in Markdown; shares in %."""
    lines = [
        "# What the step's report promised, against what independent prompts found",
        "",
        "Made by `python -m benchmarks.paper_table calibration` from the records that hold both. Promised: `measured` in the safety step's report, "
        "on prompts of the vector's own sources that no coefficient was fitted on. Found: the table's prompts of other sources, all of a kind together. "
        "Kept: the 95 % interval of promised minus found, with the errors of both, holds 0; the aim is nine runs of ten. Covers: the promised interval alone holds the figure that was found. "
        "Runs of one family are measured on the same prompts, so that they are no independent tries.",
        "",
    ]
    if not made:
        return [*lines, "No record holds a report that measured anything.", ""]
    lines += [
        "| weights | metric | runs | kept | covers | mean promised | mean found | mean difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (side, metric), own in _grouped(made):
        cells = [
            SIDES[side],
            METRICS[metric].words,
            str(len(own)),
            _of(own, lambda one: one.kept),
            _of(own, lambda one: one.covers),
            *(f"{100 * np.mean([one.share for one in each]):.1f}" for each in _sides(own)),
            f"{100 * np.mean([one.difference.share for one in own]):+.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| run | weights | metric | promised [95 %] | found [95 %] | difference [95 %] | kept |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in made:
        cells = [one.run, SIDES[one.side], METRICS[one.metric].words]
        cells += [_shown(each) for each in (one.promised, one.found, one.difference)]
        lines.append("| " + " | ".join([*cells, "yes" if one.kept else "no"]) + " |")
    return [*lines, ""]


def _grouped(made: Sequence[Promise]) -> Iterator[tuple[tuple[str, str], list[Promise]]]:
    """By side and metric."""
    for side in SIDES:
        for metric in (*COUNTED, UTILITY):
            if own := [one for one in made if (one.side, one.metric) == (side, metric)]:
                yield (side, metric), own


def _sides(own: Sequence[Promise]) -> tuple[list[Estimate], list[Estimate]]:
    return [one.promised for one in own], [one.found for one in own]


def _of(own: Sequence[Promise], holds: Callable[[Promise], bool]) -> str:
    count = sum(map(holds, own))
    return f"{count} of {len(own)} ({count / len(own):.0%})"


def _shown(one: Estimate) -> str:
    return f"{100 * one.share:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def plot(made: Sequence[Promise], target: Path) -> None:
    """Promised, with its interval, against found: a panel for each metric, with the diagonal on
    which honest promises lie.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = list(dict.fromkeys(one.metric for one in made))
    figure, axes = pyplot.subplots(
        1, len(metrics), figsize=(3.4 * len(metrics), 3.8), squeeze=False
    )
    for panel, metric in zip(axes[0], metrics, strict=True):
        own = [one for one in made if one.metric == metric]
        for side, colour in zip(SIDES, ("tab:orange", "tab:blue"), strict=True):
            shown = [one for one in own if one.side == side]
            if not shown:
                continue
            promised, found = _sides(shown)
            errors = [
                [100 * (one.share - one.low) for one in promised],
                [100 * (one.high - one.share) for one in promised],
            ]
            panel.errorbar(
                [100 * one.share for one in found],
                [100 * one.share for one in promised],
                yerr=errors,
                fmt="o",
                color=colour,
                alpha=0.7,
                label=SIDES[side],
            )
        ends = [100 * end for one in own for end in (one.promised.low, one.promised.high)]
        ends += [100 * one.found.share for one in own]
        around = (min(ends) - 2, max(ends) + 2)
        panel.plot(around, around, color="grey", linewidth=0.8)
        panel.set(title=METRICS[metric].words, xlabel="found (%)", xlim=around, ylim=around)
    axes[0][0].set_ylabel("promised (%)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def calibrate(folder: Path) -> None:
    """Writes `calibration.md` beside the records and, where they tell of anything, the plot."""
    made = promises(folder)
    lines = page(made)
    (folder / f"{NAME}.md").write_text("\n".join(lines), encoding="utf-8")
    if made:
        plot(made, folder / f"{NAME}.png")
    print("\n".join(lines))
