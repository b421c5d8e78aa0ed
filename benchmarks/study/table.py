"""The table of the study on the findings' page, from the records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import records
from benchmarks.paper_table.families import ROOT
from benchmarks.paper_table.tasks import TASKS
from benchmarks.records import RESULTS
from safegene_trl.checkpoints.atomic_writes import replace_file


KIND = "study"
SETS = {  # column: file of prompts, their kind, how many
    "BT": ("harmful/beavertails_eval_dev.jsonl", "harmful", 140),
    "DR": ("harmful/harmbench_val.jsonl", "harmful", 41),
    "malicious": ("harmful/do_not_answer_malicious.jsonl", "harmful", 243),
    "look-alikes": ("benign/oktest.jsonl", "benign", 300),
    "contrast": ("benign/coconot_contrast.jsonl", "benign", 149),
}
HARMFUL, BENIGN = (
    [column for column, (_, kind, _) in SETS.items() if kind == wanted]
    for wanted in ("harmful", "benign")
)
HARMLESS = ("sst2", "ag_news", "boolq", "gsm8k", "alpaca")
FAMILY = "qwen2.5-coder-0.5b"
PAGES = {  # by family: the page that has its table
    FAMILY: ROOT / "docs" / "findings_qwen.md",
    "smollm2-135m": ROOT / "docs" / "findings_smollm2.md",
}
CLOSING = "<!-- end -->"
Record = Mapping[str, Any]


def shares(record: Record) -> tuple[float, float]:
    """Attack success and over-refusal, each the mean of its columns (0–1)."""
    attack = fmean(_share(record, column, "a") for column in HARMFUL)
    return attack, fmean(_share(record, column, "r") for column in BENIGN)


def utility(record: Record, beside: Record) -> float:
    """The mean over the test samples that both records have (0–1)."""
    common = min(len(record["utility"]), len(beside["utility"]))
    return fmean(record["utility"][:common])


def agreement(record: Record, aligned: Record, columns: Sequence[str]) -> float:
    """Share (0–1) of the prompts that are refused if and only if the aligned model refuses them."""
    same = [
        (one == "r") == (other == "r")
        for column in columns
        for one, other in zip(record["labels"][column], aligned["labels"][column], strict=True)
    ]
    return fmean(same)


def _share(record: Record, column: str, letter: str) -> float:
    return record["labels"][column].count(letter) / len(record["labels"][column])


def rows(
    found: Mapping[str, Record], variant: str, tasks: Sequence[str], family: str = FAMILY
) -> list[dict[str, float]]:
    """What a variant comes to on each of the tasks, in points; empty where one was not measured."""
    names = [f"{family}-{task}-0-{variant}" for task in tasks]
    if not all(name in found for name in names):
        return []
    made = []
    for task, name in zip(tasks, names, strict=True):
        aligned, tuned = found[f"{family}-{task}-aligned"], found[f"{family}-{task}-0-fine-tuned"]
        record = found[name]
        (attack, refusal), (least, aligned_refusal) = shares(record), shares(aligned)
        most = shares(tuned)[0]
        made.append(
            {
                "attack": 100 * attack,
                "added": 100 * (most - least),
                "gone": 100 * (most - attack),
                "refusal": 100 * (refusal - aligned_refusal),
                "lost": 100 * (utility(tuned, record) - utility(record, tuned)),
                "harmful": 100 * agreement(record, aligned, HARMFUL),
                "benign": 100 * agreement(record, aligned, BENIGN),
            }
        )
    return made


def removed(made: Sequence[Mapping[str, float]]) -> float:
    """How much of the attack success that the fine-tunes added is gone, together (%)."""
    return 100 * sum(row["gone"] for row in made) / sum(row["added"] for row in made)


# of fine-tunes, by the name that they have in the table
MEANS = {"five harmless tasks": HARMLESS, "poisoned": ("poisoned",)}
EACH = {TASKS[task].title: (task,) for task in HARMLESS}


def table(
    found: Mapping[str, Record],
    variants: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    family: str = FAMILY,
) -> list[str]:
    """Markdown: a line for every group of tasks and variant that was measured on all of them."""
    lines = [
        "| fine-tunes | | ASR | removed | over-refusal above the aligned model's | utility lost "
        "| same decision, harmful | same, benign |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group, tasks in groups.items():
        for variant in variants:
            if made := rows(found, variant, tasks, family):
                mean = {key: fmean(row[key] for row in made) for key in made[0]}
                lines.append(
                    f"| {group} | {variant} | {mean['attack']:.1f} | {removed(made):.0f} | {mean['refusal']:+.1f} "
                    f"| {mean['lost']:.2f} | {mean['harmful']:.1f} | {mean['benign']:.1f} |"
                )
    return lines


def with_table(
    text: str, found: Mapping[str, Record], variants: Sequence[str], family: str = FAMILY
) -> str:
    """The family's page with the table in its place."""
    before, opening, rest = text.partition(f"<!-- study {family} -->\n")
    _, closing, after = rest.partition(CLOSING)
    assert opening and closing, "the page has no place for the table"
    groups = MEANS if rows(found, "fine-tuned", HARMLESS, family) else {**EACH, **MEANS}
    lines = "\n".join(table(found, variants, groups, family))
    return before + opening + "\n" + lines + "\n\n" + closing + after


def whole(found: Mapping[str, Record], variants: Sequence[str]) -> str:
    """The table of all families and tasks, as a page."""
    parts = [
        "# What each choice of the recalibration is worth\n\n"
        "Made by `python -m benchmarks.study table` from the records in `study.jsonl`; "
        "[findings](../../docs/findings.md) say what they are. All numbers in % or points.\n"
    ]
    for family in PAGES:
        if not any(name.startswith(f"{family}-") for name in found):
            continue
        lines = table(found, variants, {**MEANS, **EACH}, family)
        parts.append(f"## {family}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def render(folder: Path, variants: Sequence[str]) -> None:
    """Writes `study.md` beside the records; from the project's own also the tables of the pages."""
    found = records.load(KIND, folder)
    replace_file(folder / f"{KIND}.md", whole(found, variants))
    if folder.resolve() == RESULTS:
        for family, page in PAGES.items():
            text = page.read_text(encoding="utf-8")
            replace_file(page, with_table(text, found, variants, family))
