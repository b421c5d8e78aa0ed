"""What each choice of the recalibration is worth, on fine-tunes of a known model.

    python recipes/smollm2-135m/prepare.py --data-only
    python -m benchmarks.study prepare --data DIR --jobs 9           # the vector and the fine-tunes, many at once
    python -m benchmarks.study run --data DIR --minutes 9
    python -m benchmarks.study table                                 # the findings' table from the records

One fine-tune and variant is one record in `benchmarks/results/study.jsonl`; what is there is not
measured again. Everything but the training runs in one process, on an accelerator where there is
one. Several may work on different tasks or seeds at once, once the first of them has made the
vector and asked the aligned model.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.paper_table.families import FAMILIES, Family, device
from benchmarks.paper_table.lab import Lab
from benchmarks.paper_table.tasks import TASKS, Task, fine_tuned
from benchmarks.paper_table.vectors import WHOLE, vector
from benchmarks.records import RESULTS
from safegene_trl import SafetyVector
from safegene_trl.errors import SafeGeneError
from safegene_trl.provenance import software_versions

from .bank import BENIGN_PROMPTS, bank
from .findings import write as write_findings
from .table import FAMILY, KIND, SETS, render, shares
from .variants import VARIANTS, FineTune, Made


TEST_ROWS, FREE_ROWS = 1000, 200


def main(argv: Sequence[str] | None = None) -> None:
    begun = time.monotonic()
    arguments = _parser().parse_args(argv)
    if arguments.command == "table":
        render(arguments.results, list(VARIANTS))
        if arguments.results.resolve() == RESULTS:
            write_findings()
        return
    family = FAMILIES[arguments.family]
    if arguments.aligned:
        family = replace(family, aligned=str(arguments.aligned.resolve()))
    if arguments.source:
        family = replace(family, source=str(arguments.source.resolve()))
    if arguments.command == "prepare":
        prepare(arguments, family)
        return
    lab = Lab(arguments.data, TEST_ROWS, FREE_ROWS, arguments.scale, family, SETS)
    lab.used = [BENIGN_PROMPTS]  # what the bank draws from; other data made the demonstration alone
    run(lab, arguments, begun + 60 * arguments.minutes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare", help="make the vector and the fine-tunes")
    running = commands.add_parser("run", help="measure what is missing")
    drawing = commands.add_parser("table", help="the findings' table")
    for command in (running, drawing):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    for command in (making, running):
        command.add_argument(
            "--data", type=Path, help="folder with the data sets (default: the hub)"
        )
        command.add_argument("--family", choices=list(FAMILIES), default=FAMILY)
        command.add_argument("--aligned", type=Path, help="folder of the family's aligned model")
        command.add_argument(
            "--source", type=Path, help="folder of the other family's aligned model"
        )
        command.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
        command.add_argument("--seeds", nargs="+", type=int, default=[0])
    making.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    running.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    running.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no variant after this time"
    )
    running.add_argument(
        "--scale", type=float, default=1.0, help="share of the prompts, to see that it runs"
    )
    return parser


def prepare(arguments: argparse.Namespace, family: Family) -> None:
    """Makes what is not there of the vector's components and the fine-tunes, several at once, each in
    processes of its own; what fails is said at the end, when the others are made.
    """
    with ThreadPoolExecutor(max(arguments.jobs, 1)) as pool:
        made = [
            pool.submit(vector, kind, arguments.data, family)
            for kind in (() if family.vector else family.degradations)
        ]
        made += [
            pool.submit(fine_tuned, TASKS[task], seed, arguments.data, family)
            for seed in arguments.seeds
            for task in arguments.tasks
        ]
        for done in as_completed(made):
            print(done.exception() or f"made {done.result()}", flush=True)
    for done in made:
        done.result()
    print(f"made {vector(WHOLE, arguments.data, family)}", flush=True)


def run(lab: Lab, arguments: argparse.Namespace, until: float) -> None:
    """Measures the variants that are not there, in their order, as long as there is time."""
    rows, whole = bank(lab), SafetyVector.from_pretrained(lab.vector)
    counts = {
        k: sum(row["kind"] == k for row in rows) for k in ("harmful", "other", "benign", "border")
    }
    print(f"Prompts to draw from: {counts}", flush=True)
    for seed in arguments.seeds:
        for name in arguments.tasks:
            task = TASKS[name]
            cell(lab, task, record_name(lab.family, task), ({}, {}), arguments.results)
            update = lab.update_of(fine_tuned(task, seed, lab.data, lab.family))
            tuned = FineTune(lab, whole, rows, task, seed, update)
            for variant in arguments.variants:
                if time.monotonic() > until:
                    return
                measured(tuned, variant, arguments.results)


def record_name(family: Family, task: Task, seed: int | None = None, variant: str = "") -> str:
    """Of a variant's record, or without one of the aligned model's."""
    own = "aligned" if seed is None else f"{seed}-{variant}"
    return f"{family.name}-{task.name}-{own}"


def measured(tuned: FineTune, variant: str, folder: Path) -> None:
    """Makes and measures a variant unless it is there. One that fails leaves no record, and the run
    goes on.
    """
    name = record_name(tuned.lab.family, tuned.task, tuned.seed, variant)
    if name in records.load(KIND, folder):
        return
    try:
        made = VARIANTS[variant](tuned)
        if not all(bool(matrix.isfinite().all()) for matrix in made[0].values()):
            raise SafeGeneError("its weights are no numbers")
    except (SafeGeneError, torch.OutOfMemoryError) as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return
    cell(tuned.lab, tuned.task, name, made, folder)


def cell(lab: Lab, task: Task, name: str, made: Made, folder: Path) -> None:
    """Measures an update unless its record is there."""
    if name in records.load(KIND, folder):
        return
    update, about = made
    found = lab.measure(update, task, lab.family.work / "study" / "answers" / f"{name}.jsonl")
    record: dict[str, Any] = {
        **found,
        "utility_measure": task.utility,
        "about": about,
        "device": device().type,
        "dtype": lab.family.dtype,
        "scale": lab.scale,
        "software": software_versions(),
    }
    records.write(KIND, name, record, folder)
    attack, refusal = shares(record)
    utility = sum(found["utility"]) / len(found["utility"])
    print(
        f"{name}: attack success {attack:.1%}, over-refusal {refusal:.1%}, utility {utility:.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
