"""What the safety step costs on a GPU: seconds and memory of each phase beside the training's own,
and copies and seconds while the vector is on.

    python -m benchmarks.gpu --record NAME                       # at most 8 minutes on any GPU
    python -m benchmarks.gpu --record NAME --sizes --model DIR --vector DIR    # a real model alone
    python -m benchmarks.gpu --record NAME --results DIR --tiny  # every row on a CPU, in a minute

Every row is a process of its own, and goes into the record when it is done. The same command again
measures what is missing: what failed, what there was no time for, and what was measured on another
device, with other versions or with other code.

Llamas of 1.5 and 8 B parameters with random weights get a LoRA of rank 16 on all linear layers in
bfloat16, with gradient checkpointing, and the step with its defaults. The vectors are random as
well: `half` of rank 8 on half of the layers, `components` of 3 × rank 8 on all. Rows of the kind
`step` are a fine-tune with the step, `attached` is passes and decoding with the vector on. On a GPU
memory is what its allocator held, on a CPU the process's.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from safegene_trl.commands.process_tree import ProcessTree
from safegene_trl.errors import SafeGeneError
from safegene_trl.provenance import software_versions

from .rows import AIMS, Row, wanted


ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 20.0  # no row is begun with less
MOST_SECONDS = 240.0  # of one row
FIGURES, LOG = "figures.json", "log.txt"
Identity = dict[str, Any]


def main() -> int:
    arguments = parsed()
    if arguments.measure:
        return measure_one(arguments)
    rows = rows_of(arguments)
    known, until = identity(), time.monotonic() + 60 * arguments.minutes
    for row in rows:
        if is_done(stored(arguments).get(row.name), known):
            print(f"{row.name}: measured before", flush=True)
            continue
        left = min(until - time.monotonic(), MOST_SECONDS)
        if left < LEAST_SECONDS:
            print(f"{row.name}: no time left, call again", flush=True)
            continue
        store(arguments, row, known | run(row, arguments, left))
    found = stored(arguments)
    print(table(rows, found))
    return 0 if all(is_done(found.get(row.name), known) for row in rows) else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="a checkpoint to measure on too, before others")
    parser.add_argument("--vector", type=Path, help="the safety vector of `--model`")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row goes on after them")
    parser.add_argument("--sizes", nargs="*", choices=["1b", "8b"], default=["1b", "8b"])
    parser.add_argument("--record", metavar="NAME", help="the record's name")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="its folder")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="for checkpoints")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too")
    parser.add_argument("--measure", metavar="ROW", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.record or arguments.measure):
        parser.error("Name the record: `--record NAME`.")
    if not (arguments.tiny or arguments.measure or torch.cuda.is_available()):
        parser.error("There is no GPU here: `--tiny` runs every row on the CPU.")
    if arguments.vector and not arguments.model:
        parser.error("`--vector` needs the model that it is for: `--model DIR`.")
    if arguments.model and not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} is no checkpoint: name a folder with a config.json.")
    return arguments


def own_name(arguments: argparse.Namespace) -> str | None:
    """The size of rows on `--model`."""
    return arguments.model.resolve().name if arguments.model else None


def rows_of(arguments: argparse.Namespace) -> list[Row]:
    sizes, own = ["tiny"] if arguments.tiny else arguments.sizes, own_name(arguments)
    return wanted(sizes, own) if arguments.vector else wanted([own, *sizes] if own else sizes)


def identity() -> Identity:
    """What figures are of. Rows of one that is another are measured anew."""
    return {
        "device": device(),
        "software": software_versions() | {"cuda": torch.version.cuda},
        "sources": sources(),
    }


def device() -> dict[str, Any]:
    """Asked of the driver: this process leaves the device alone."""
    if not torch.cuda.is_available():
        return {"name": "cpu", "cores": os.cpu_count()}
    keys = ("name", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    command += ["-i", first_device()]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        values = told.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError):
        values = [torch.cuda.get_device_name()]
    return dict(zip(keys, values, strict=False)) | {"cores": os.cpu_count()}


def first_device() -> str:
    """Of those that may be used: several would share out the batches of a training."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def sources() -> dict[str, str | None]:
    """The commit, where there is a repository, and a hash of what is run, changes included."""
    digest = hashlib.sha256()
    for folder in ("safegene_trl", "benchmarks/gpu"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        commit = told.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"commit": commit, "sha256": digest.hexdigest()}


def is_done(row: dict[str, Any] | None, known: Identity) -> bool:
    """Whether it was measured, of the same."""
    return (
        row is not None
        and row["status"] == "measured"
        and all(row[key] == known[key] for key in ("device", "software"))
        # a commit that leaves the code as it is asks for nothing
        and row["sources"]["sha256"] == known["sources"]["sha256"]
    )


def stored(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows of the record so far."""
    return records.load("gpu", arguments.results).get(arguments.record, {}).get("rows", {})


def store(arguments: argparse.Namespace, row: Row, figures: dict[str, Any]) -> None:
    arguments.results.mkdir(parents=True, exist_ok=True)
    rows = stored(arguments) | {row.name: figures}
    aims = [{"what": aim.what, "most": aim.most, "only": list(aim.only)} for aim in AIMS]
    about = "`python -m benchmarks.gpu`, one process on the device at a time"
    record = {"about": about, "aims": aims, "rows": rows}
    records.write("gpu", arguments.record, record, arguments.results)
    print(f"{row.name}: {figures['status']} in {figures['wall_seconds']:.0f} s", flush=True)


def run(row: Row, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A row's figures and how it ended, by a process that gets so many seconds."""
    folder = arguments.work / row.name.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--measure", row.name]
    command += ["--work", str(folder)]
    if row.size == own_name(arguments):
        command += ["--model", str(arguments.model)]
        command += ["--vector", str(arguments.vector)] if row.vector == "own" else []
    found_first = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": found_first, "CUDA_VISIBLE_DEVICES": first_device()}
    started = time.monotonic()
    tree = ProcessTree(command, folder / LOG, os.environ | environment)
    try:
        while (code := tree.poll()) is None and time.monotonic() - started < seconds:
            time.sleep(0.1)
    finally:
        if tree.poll() is None:
            ProcessTree.end([tree])
    figures = json.loads(file.read_text()) if (file := folder / FIGURES).is_file() else {}
    ended = {"status": "measured" if code == 0 else "out of time" if code is None else "failed"}
    if code:
        said = (folder / LOG).read_text(errors="replace").strip().splitlines()
        ended |= {"error": " | ".join(said[-3:])[-600:]}
    shutil.rmtree(folder, ignore_errors=True)  # tens of GB
    wall = round(time.monotonic() - started, 1)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return ended | {"measured_at": now, "wall_seconds": wall} | figures


def measure_one(arguments: argparse.Namespace) -> int:
    """In the process of a row."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    from .measuring import measure
    from .settings import Given

    def note(figures: dict[str, Any]) -> None:
        records.save(arguments.work / FIGURES, figures)

    row = Row.named(arguments.measure)
    figures = measure(row, Given(arguments.model, arguments.vector, arguments.work), note)
    note(figures)
    status = figures.get("report", {}).get("status", "safeguarded")
    return 0 if status == "safeguarded" else 3


def end_with(parent: int) -> None:
    """Nobody waits for a row whose command was killed: it would hold the device."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def table(rows: list[Row], found: dict[str, Any]) -> str:
    """Every aim beside what was measured."""
    lines = []
    for aim in AIMS:
        for row in rows:
            figure = aim.figure(row, found.get(row.name, {}))
            if figure is not None:
                kept = "kept" if figure <= aim.most else "missed"
                lines.append(f"{figure:10.4g}  of {aim.most:g}  {kept:7} {row.name}: {aim.what}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SafeGeneError as error:
        sys.exit(str(error))
