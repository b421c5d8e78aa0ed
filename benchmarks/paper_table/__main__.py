"""The table's command line.

    python recipes/smollm2-135m/prepare.py                                  # aligned model and data
    python -m benchmarks.paper_table run --data DIR                         # every cell that is not there yet
    python -m benchmarks.paper_table run --data DIR --methods ablations --tasks sst2 --seeds 0
    python -m benchmarks.paper_table utility --data DIR --methods fine-tuned SafeGene       # the same on more test samples
    python -m benchmarks.paper_table render                                 # table and plot from the cells
    python -m benchmarks.paper_table cosines                                # how alike the fine-tunes are that have been made

One cell (task, seed, method) is one record in `benchmarks/results/paper_table.jsonl`, named
TASK-SEED-METHOD; delete its line to measure it again. A run that was cut off goes on where it
stopped. Models, vectors and the models' answers stay in `build/paper_table/`. Without --data the
data sets come from the hub. Several runs may work on different seeds or tasks at once.
"""

import argparse
import re
import subprocess
import sys
import time
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.records import RESULTS
from safegene_trl.errors import SafeGeneError
from safegene_trl.provenance import software_versions
from safegene_trl.vectors.similarity import cosine

from .lab import SETS, Lab, change
from .methods import ABLATIONS, METHODS, VARIANTS, aligned, plain
from .render import CELLS, UTILITY, render
from .tasks import STEPS, TASKS, TRAINING, WORK


MORE_TEST_ROWS, MORE_FREE_ROWS = 1000, 300
ROWS = ChainMap({"aligned": aligned}, METHODS, VARIANTS, ABLATIONS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what is missing")
    counting = commands.add_parser("utility", help="utility alone, on more test samples")
    drawing = commands.add_parser("render", help="table and plot")
    comparing = commands.add_parser("cosines", help="how alike the fine-tunes are")
    for command in (run, counting, drawing, comparing):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    for wanted in (run, counting):
        wanted.add_argument(
            "--data", type=Path, help="folder with the data sets (default: the hub)"
        )
        wanted.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
        wanted.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        wanted.add_argument(
            "--methods",
            nargs="+",
            default=["table"],
            help="`table`, `variants` (of SafeGene), `ablations` (of one component), or rows by name",
        )
    run.add_argument(
        "--scale", type=float, default=1.0, help="share of the prompts, to see that it runs"
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "render":
        render(arguments.results)
        return
    if arguments.command == "cosines":
        cosines(Lab(None), arguments.results)
        return
    groups = {
        "table": ["aligned", *METHODS],
        "variants": list(VARIANTS),
        "ablations": list(ABLATIONS),
    }
    methods = [name for word in arguments.methods for name in groups.get(word, [word])]
    if odd := [name for name in methods if name not in ROWS]:
        parser.error(f"there is no row {odd[0]!r}: use one of {', '.join([*groups, *ROWS])}")
    cells = [
        (task, seed, method)
        for seed in arguments.seeds
        for task in arguments.tasks
        for method in methods
    ]
    if arguments.command == "utility":
        lab = Lab(arguments.data, test_rows=MORE_TEST_ROWS, free_rows=MORE_FREE_ROWS)
        for task, seed, method in cells:
            utility_cell(lab, task, seed, method, arguments.results)
        return
    lab = Lab(arguments.data, scale=arguments.scale)
    for task, seed, method in cells:
        cell(lab, task, seed, method, arguments.results)


def cell(lab: Lab, task_name: str, seed: int, method: str, folder: Path) -> None:
    """Measures one cell unless it is there. A method that fails leaves no cell, and the run goes
    on.
    """
    name = cell_name(task_name, seed, method)
    measured_already = name in records.load(CELLS, folder)
    if measured_already or method == f"vector: {task_name}" or (method == "aligned" and seed):
        return  # the aligned model is the same for every seed
    task, started = TASKS[task_name], time.perf_counter()
    try:
        before = plain(lab, task, seed)[0]
        begun = time.perf_counter()
        update, about = ROWS[method](lab, task, seed)
        seconds = time.perf_counter() - begun
        measured = lab.measure(update, task, WORK / "answers" / f"{name}.jsonl")
    except (SafeGeneError, subprocess.CalledProcessError) as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return
    record = {
        "task": task_name,
        "seed": seed,
        "method": method,
        "utility_measure": task.utility,
        **measured,
    }
    record |= {
        "method_seconds": seconds,
        "about": about,
        "threads": torch.get_num_threads(),
        "scale": lab.scale,
    }
    if update:
        record["update"] = change(before, update)
    record["training"] = {
        "steps": STEPS,
        "batch_size": task.batch,
        "learning_rate": TRAINING["learning_rate"],
    }
    record |= {
        "prompts": {column: len(prompts) for column, prompts in lab.prompts.items()},
        "sets": SETS,
    }
    record["software"] = software_versions()
    records.write(CELLS, name, record, folder)
    shares = {
        column: f"{letters.count('a') / len(letters):.0%}"
        for column, letters in measured["labels"].items()
    }
    utility = sum(measured["utility"]) / len(measured["utility"])
    print(
        f"{name}: answered {shares}, utility {utility:.3f}, {time.perf_counter() - started:.0f} s",
        flush=True,
    )


def utility_cell(lab: Lab, task_name: str, seed: int, method: str, folder: Path) -> None:
    """Measures the utility on as many test samples as the lab takes, unless that has been done."""
    name, task = cell_name(task_name, seed, method), TASKS[task_name]
    if name in records.load(UTILITY, folder):
        return
    with lab.updated(ROWS[method](lab, task, seed)[0]) as model:
        found = lab.utility(model, task)
    scores = "".join(str(int(value)) for value in found) if task.labels else found
    record = {
        "task": task_name,
        "seed": seed,
        "method": method,
        "utility_measure": task.utility,
        "scores": scores,
    }
    records.write(UTILITY, name, record | {"software": software_versions()}, folder)
    print(f"{name}: {sum(found) / len(found):.4f} of {len(found)}", flush=True)


def cosines(lab: Lab, results: Path) -> None:
    """Pairwise cosines of the fine-tunes' updates; with the sign turned round each is a vector of
    one component.
    """
    folders = sorted(path.parent for path in (WORK / "fine-tuned").glob("*/adapter_config.json"))
    names, updates = (
        [folder.name for folder in folders],
        [lab.factors_of(folder) for folder in folders],
    )
    table = [[round(cosine(one, two) or 0.0, 4) for two in updates] for one in updates]
    record = {"fine_tunes": names, "cosines": table, "software": software_versions()}
    records.write("cosines", "fine-tunes", record, results)
    for name, row in zip(names, table, strict=True):
        print(f"{name:12}" + "".join(f"{value:8.3f}" for value in row))


def cell_name(task: str, seed: int, method: str) -> str:
    """A cell's name among the records, and that of the file with its answers."""
    slug = re.sub(r"[^\w]+", "-", method.replace("λ", "lambda")).strip("-").lower()
    return f"{task}-{seed}-{slug}"


if __name__ == "__main__":
    main()
