"""The table's command line.

    python recipes/smollm2-135m/prepare.py                                  # aligned model and data
    python -m benchmarks.paper_table run --data DIR                         # every cell that is not there yet
    python -m benchmarks.paper_table run --data DIR --methods ablations --tasks sst2 --seeds 0
    python -m benchmarks.paper_table utility --data DIR --methods fine-tuned SafeGene       # the same on more test samples
    python -m benchmarks.paper_table render                                 # table and plot from the cells
    python -m benchmarks.paper_table cosines                                # how alike the fine-tunes are that have been made
    python -m benchmarks.paper_table calibration                            # what the step's report promised, against what the cells found

Another family, a released model on a GPU, for as long as there is one:

    python recipes/smollm2-135m/prepare.py --data-only
    python -m benchmarks.paper_table run --data DIR --family qwen2.5-coder-0.5b --minutes 9

One cell (task, seed, method) is one record in `benchmarks/results/paper_table.jsonl`, named
TASK-SEED-METHOD, of another family FAMILY-TASK-SEED-METHOD; delete its line to measure it again.
The most informative cells come first. A run that was cut off goes on where it stopped. Models,
vectors and the models' answers stay in `build/paper_table/`. Without --data the data sets come from
the hub. Several runs may work on different seeds or tasks at once. On an accelerator all models are
in bfloat16, on a CPU in float32.
"""

import argparse
import re
import subprocess
import sys
import time
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.records import RESULTS
from safegene_trl.errors import SafeGeneError
from safegene_trl.provenance import software_versions
from safegene_trl.vectors.similarity import cosine

from .calibration import calibrate
from .families import FAMILIES, FIRST, SMOLLM2, Family, device
from .lab import SETS, Lab, change
from .methods import ABLATIONS, METHODS, NEED_BASE, VARIANTS, aligned, plain
from .render import CELLS, UTILITY, render
from .schedule import Budget, Cell, expected_seconds, ordered
from .tasks import TASKS, batch_size, fine_tune_folder, is_trained, training_steps


MORE_TEST_ROWS, MORE_FREE_ROWS = 1000, 300
ROWS = ChainMap({"aligned": aligned}, METHODS, VARIANTS, ABLATIONS)
ON_RECORDS = {"render": render, "calibration": calibrate}  # commands that measure nothing
GROUPS = {"table": ["aligned", *METHODS], "variants": list(VARIANTS), "ablations": list(ABLATIONS)}
# of one cell: the run says so and goes on with the others
FAILURES = (
    SafeGeneError,
    subprocess.CalledProcessError,
    subprocess.TimeoutExpired,
    torch.OutOfMemoryError,
    torch.linalg.LinAlgError,
)


def main(argv: Sequence[str] | None = None) -> None:
    started = time.monotonic()
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command in ON_RECORDS:
        ON_RECORDS[arguments.command](arguments.results)
        return
    family = _family(arguments)
    try:
        if arguments.command == "cosines":
            cosines(Lab(None, family=family), arguments.results, family)
            return
        cells = wanted(parser, arguments, family)
        if arguments.command == "utility":
            lab = Lab(
                arguments.data, test_rows=MORE_TEST_ROWS, free_rows=MORE_FREE_ROWS, family=family
            )
            for one in cells:
                utility_cell(lab, one, arguments.results, family)
            return
        budget = None if arguments.minutes is None else Budget(arguments.minutes, started)
        lab = Lab(arguments.data, scale=arguments.scale, family=family)
        run(lab, ordered(cells), arguments.results, family, budget)
    except SafeGeneError as error:
        raise SystemExit(f"{parser.prog}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure what is missing")
    counting = commands.add_parser("utility", help="utility alone, on more test samples")
    drawing = commands.add_parser("render", help="table and plot")
    comparing = commands.add_parser("cosines", help="how alike the fine-tunes are")
    promising = commands.add_parser("calibration", help="the report's promises against the cells")
    for command in (running, counting, drawing, comparing, promising):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    for command in (running, counting, comparing):
        command.add_argument("--family", choices=list(FAMILIES), default=FIRST)
        command.add_argument(
            "--aligned", type=Path, metavar="DIR", help="folder of the family's aligned model"
        )
        command.add_argument(
            "--base", metavar="DIR", help="the model before its alignment, a folder or hub id"
        )
    for command in (running, counting):
        command.add_argument(
            "--data", type=Path, help="folder with the data sets (default: the hub)"
        )
        command.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
        command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        command.add_argument(
            "--methods",
            nargs="+",
            default=["table"],
            help="`table`, `variants` (of SafeGene), `ablations` (of one component), or rows by name",
        )
    running.add_argument(
        "--scale", type=float, default=1.0, help="share of the prompts, to see that it runs"
    )
    running.add_argument(
        "--minutes", type=float, help="begin no cell that would not end in this time"
    )
    return parser


def _family(arguments: argparse.Namespace) -> Family:
    family = FAMILIES[arguments.family]
    if arguments.aligned is not None:
        family = replace(family, aligned=str(arguments.aligned.resolve()))
    return family if arguments.base is None else replace(family, base=arguments.base)


def wanted(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, family: Family
) -> list[Cell]:
    """The cells that were asked for, without those that have no meaning or cannot be had."""
    methods = [name for word in arguments.methods for name in GROUPS.get(word, [word])]
    if odd := [name for name in methods if name not in ROWS]:
        parser.error(f"there is no row {odd[0]!r}: use one of {', '.join([*GROUPS, *ROWS])}")
    if family.base is None and (lost := [name for name in methods if name in NEED_BASE]):
        print(
            f"Left out, because they read the model before its alignment: {', '.join(lost)}. "
            "Name it with --base.",
            flush=True,
        )
        methods = [name for name in methods if name not in lost]
    return [
        (task, seed, method)
        for seed in arguments.seeds
        for task in arguments.tasks
        for method in methods
        # the aligned model is the same for every seed
        if method != f"vector: {task}" and not (method == "aligned" and seed)
    ]


def run(
    lab: Lab, cells: Sequence[Cell], folder: Path, family: Family, budget: Budget | None
) -> None:
    """Measures the cells that are not there, in this order, as long as the budget lasts."""
    for place, one in enumerate(cells):
        found = records.load(CELLS, folder)
        if cell_name(*one, family) in found:
            continue
        if budget is not None:
            seconds, now = expected_seconds(one, found, family), time.monotonic()
            if not budget.allows(seconds, now):
                print(
                    f"Stopped after {budget.spent(now):.1f} of {budget.minutes:g} minutes: "
                    f"{cell_name(*one, family)} is expected to take {seconds:.0f} s. "
                    f"Cells before it: {place} of {len(cells)}. The same command goes on here.",
                    flush=True,
                )
                return
        cell(lab, *one, folder, family)


def cell(
    lab: Lab, task_name: str, seed: int, method: str, folder: Path, family: Family = SMOLLM2
) -> None:
    """Measures one cell unless it is there. A method that fails leaves no cell, and the run goes
    on.
    """
    name = cell_name(task_name, seed, method, family)
    if name in records.load(CELLS, folder):
        return
    task, started = TASKS[task_name], time.perf_counter()
    is_new = method != "aligned" and not is_trained(fine_tune_folder(task, seed, family))
    try:
        before = {} if method == "aligned" else plain(lab, task, seed)[0]
        trained = time.perf_counter()
        if family.vector is None and method not in ("aligned", "fine-tuned"):
            assert lab.vector  # made here if it is not there, so that it counts for no method
        begun = time.perf_counter()
        update, about = ROWS[method](lab, task, seed)
        seconds = time.perf_counter() - begun
        measured = lab.measure(update, task, family.work / "answers" / f"{name}.jsonl")
    except FAILURES as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return
    record = {
        "task": task_name,
        "seed": seed,
        "method": method,
        "family": family.name,
        "utility_measure": task.utility,
        **measured,
        # the step's own measurement is none of the method's
        "method_seconds": seconds - about.get("measuring_seconds", 0.0),
        "about": about,
        "threads": torch.get_num_threads(),
        "device": device().type,
        "dtype": family.dtype,
        "scale": lab.scale,
        **({"training_seconds": trained - started} if is_new else {}),
        **({"update": change(before, update)} if update else {}),
        "prompts": {column: len(prompts) for column, prompts in lab.prompts.items()},
        "sets": SETS,
        "software": software_versions(),
    }
    record["training"] = {
        "steps": training_steps(task, family),
        "batch_size": batch_size(task, family),
        "learning_rate": family.learning_rate,
    }
    records.write(CELLS, name, record, folder)
    _say(name, measured, time.perf_counter() - started)


def _say(name: str, measured: dict[str, Any], seconds: float) -> None:
    shares = {
        column: f"{letters.count('a') / len(letters):.0%}"
        for column, letters in measured["labels"].items()
    }
    utility = sum(measured["utility"]) / len(measured["utility"])
    print(f"{name}: answered {shares}, utility {utility:.3f}, {seconds:.0f} s", flush=True)


def utility_cell(lab: Lab, one: Cell, folder: Path, family: Family = SMOLLM2) -> None:
    """Measures the utility on as many test samples as the lab takes, unless that has been done."""
    task_name, seed, method = one
    name, task = cell_name(task_name, seed, method, family), TASKS[task_name]
    if name in records.load(UTILITY, folder):
        return
    with lab.updated(ROWS[method](lab, task, seed)[0]) as model:
        found = lab.utility(model, task)
    scores = "".join(str(int(value)) for value in found) if task.labels else found
    record = {
        "task": task_name,
        "seed": seed,
        "method": method,
        "family": family.name,
        "utility_measure": task.utility,
        "scores": scores,
    }
    records.write(UTILITY, name, record | {"software": software_versions()}, folder)
    print(f"{name}: {sum(found) / len(found):.4f} of {len(found)}", flush=True)


def cosines(lab: Lab, results: Path, family: Family = SMOLLM2) -> None:
    """Pairwise cosines of the fine-tunes' updates; with the sign turned round each is a vector of
    one component.
    """
    folders = sorted(
        path.parent for path in (family.work / "fine-tuned").glob("*/adapter_config.json")
    )
    names, updates = (
        [folder.name for folder in folders],
        [lab.factors_of(folder) for folder in folders],
    )
    table = [[round(cosine(one, two) or 0.0, 4) for two in updates] for one in updates]
    record = {"fine_tunes": names, "cosines": table, "software": software_versions()}
    records.write("cosines", f"{family.prefix}fine-tunes", record, results)
    for name, row in zip(names, table, strict=True):
        print(f"{name:12}" + "".join(f"{value:8.3f}" for value in row))


def cell_name(task: str, seed: int, method: str, family: Family = SMOLLM2) -> str:
    """A cell's name among the records, and that of the file with its answers."""
    spelled = method.replace("λ", "lambda").replace("α", "alpha")
    slug = re.sub(r"[^\w]+", "-", spelled).strip("-").lower()
    return f"{family.prefix}{task}-{seed}-{slug}"


if __name__ == "__main__":
    main()
