"""The findings' page in short: one table and one plot of both families, from their records."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import records
from benchmarks.paper_table.families import ROOT
from benchmarks.paper_table.render import OURS, Row, harmless, load
from benchmarks.paper_table.tasks import TASKS
from benchmarks.records import RESULTS
from safegene_trl.checkpoints.atomic_writes import replace_file

from .table import CLOSING, FAMILY, HARMLESS, KIND, Record, shares, utility


PAGE, PLOT = ROOT / "docs" / "findings.md", "findings.png"
OPENING = "<!-- findings -->\n"
DEFAULT = "KL, border"  # of the study's variants, the one that the step's defaults are
BEST = "KL, border, 128"  # and the one that the page recommends on a GPU
RELEASED, OURS_135M = "Qwen2.5-Coder-0.5B-Instruct", "SmolLM2-135M"
SAFEGUARDED, LARGER = "safeguarded", "safeguarded, four times the shots"
BASELINE = "few-shot LoRA"


@dataclass(frozen=True)
class Point:
    """A model's shares (0–1) on the prompts of its family, and what it loses of its task."""

    attack: float
    refusal: float
    lost: float = 0.0


@dataclass(frozen=True)
class Group:
    """Fine-tunes of one family that are told together: what each method comes to on each of them.

    Attributes:
        model: The family's name for people.
        fine_tunes: What they are.
        points: By method, one of each task; the aligned model is the first of them.
        tasks: Names of the tasks.
    """

    model: str
    fine_tunes: str
    points: dict[str, list[Point]]
    tasks: list[str]


def groups(folder: Path = RESULTS) -> list[Group]:
    """The released model's of the study and the demonstration's of the table."""
    study = records.load(KIND, folder)
    table = load(folder)
    return [
        _of_study(study, HARMLESS, "5 harmless"),
        _of_study(study, ["poisoned"], "1 poisoned"),
        _of_table(harmless(table), "15 harmless"),
        _of_table({"poisoned": table["poisoned"]}, "3 poisoned"),
    ]


def _of_study(found: dict[str, Record], tasks: Sequence[str], name: str) -> Group:
    points: dict[str, list[Point]] = {
        own: [] for own in ("aligned", "fine-tuned", SAFEGUARDED, LARGER)
    }
    for task in tasks:
        aligned, tuned = (found[f"{FAMILY}-{task}-{own}"] for own in ("aligned", "0-fine-tuned"))
        for method, record in {
            "aligned": aligned,
            "fine-tuned": tuned,
            SAFEGUARDED: found[f"{FAMILY}-{task}-0-{DEFAULT}"],
            LARGER: found[f"{FAMILY}-{task}-0-{BEST}"],
        }.items():
            lost = utility(tuned, record) - utility(record, tuned)
            points[method].append(Point(*shares(record), lost))
    return Group(RELEASED, name, points, [TASKS[task].title for task in tasks])


def _of_table(tasks: dict[str, dict[str, Row]], name: str) -> Group:
    said = {"aligned": "aligned", "fine-tuned": "fine-tuned", OURS: SAFEGUARDED, BASELINE: BASELINE}
    points: dict[str, list[Point]] = {own: [] for own in said.values()}
    for rows in tasks.values():
        for method, own in said.items():
            row = rows[method]
            lost = rows["fine-tuned"].at(row.seeds).utility - row.utility
            points[own].append(Point(row.attack_success, row.over_refusal, lost))
    return Group(OURS_135M, name, points, [TASKS[task].title for task in tasks])


def table(found: Sequence[Group]) -> list[str]:
    """Markdown: a line for each group and method, the mean over its tasks; shares in %."""
    lines = [
        "| model | fine-tunes | | attack success | of what was added, removed | over-refusal "
        "| utility lost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group in found:
        mean = {method: _mean(own) for method, own in group.points.items()}
        added = mean["fine-tuned"].attack - mean["aligned"].attack
        for method, point in mean.items():
            removed, lost = "", ""
            if method not in ("aligned", "fine-tuned"):
                removed = f"{100 * (mean['fine-tuned'].attack - point.attack) / added:.0f} %"
                lost = f"{100 * point.lost:.1f} points"
            lines.append(
                f"| {group.model} | {group.fine_tunes} | {method} | {100 * point.attack:.1f} % "
                f"| {removed} | {100 * point.refusal:.1f} % | {lost} |"
            )
    return lines


def _mean(points: Sequence[Point]) -> Point:
    return Point(
        float(np.mean([point.attack for point in points])),
        float(np.mean([point.refusal for point in points])),
        float(np.mean([point.lost for point in points])),
    )


def plot(found: Sequence[Group], target: Path) -> None:
    """One panel for each family: an arrow from every task's fine-tune to what the step makes of it,
    in attack success and over-refusal, and the aligned model that it should come back to.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(group.model for group in found))
    figure, axes = pyplot.subplots(1, len(models), figsize=(4.6 * len(models), 4.2), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for group in (own for own in found if own.model == model):
            aligned = _mean(group.points["aligned"])
            axis.plot(100 * aligned.refusal, 100 * aligned.attack, "k*", markersize=16)
            pairs = zip(
                group.tasks, group.points["fine-tuned"], group.points[SAFEGUARDED], strict=True
            )
            for task, before, after in pairs:
                colour = "tab:red" if task == "poisoned" else "tab:blue"
                ends = [(100 * one.refusal, 100 * one.attack) for one in (before, after)]
                style = {"arrowstyle": "->", "color": colour, "lw": 1.5}
                axis.annotate("", xy=ends[1], xytext=ends[0], arrowprops=style)
                axis.plot(*ends[0], "o", color=colour)
                axis.annotate(f" {task}", ends[0], fontsize=8, va="bottom")
        axis.set(title=model, xlabel="benign prompts refused, %", xlim=(0, 80), ylim=(0, 100))
    axes[0][0].set_ylabel("harmful prompts answered, %")
    figure.text(
        0.5, 0.005, "dot: fine-tuned    arrow: the safety step    star: the aligned model",
        ha="center", fontsize=9,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(target, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def with_table(text: str, found: Sequence[Group]) -> str:
    """The page with the table in its place."""
    before, opening, rest = text.partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    assert opening and closing, "the page has no place for the table"
    return before + opening + "\n" + "\n".join(table(found)) + "\n\n" + closing + after


def write() -> None:
    """Writes the page's table, and the plot beside the records."""
    found = groups()
    replace_file(PAGE, with_table(PAGE.read_text(encoding="utf-8"), found))
    plot(found, RESULTS / PLOT)
