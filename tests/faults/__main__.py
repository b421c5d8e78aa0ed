"""See the package's docstring."""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.records import save
from safegene_trl.provenance import software_versions

from . import __doc__ as purpose
from .suite import Suite, summary
from .world import JOBS


def main() -> int:
    parser = argparse.ArgumentParser(
        description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="Begin no further fault after so many."
    )
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot be forked
    # tqdm's own lock is a semaphore that all forked processes share: a child killed while it holds
    # it would block the others
    tqdm.set_lock(threading.RLock())
    started, record = time.monotonic(), arguments.record and arguments.record.resolve()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve()
        os.environ["HF_DATASETS_CACHE"] = str(root / "cache")
        os.chdir(root)
        (root / "world").mkdir()
        suite = Suite(root / "world", tuple(arguments.jobs))
        found, ready = [], time.monotonic() - started
        for fault in suite.choose(arguments.count, arguments.seed):
            if time.monotonic() - started > arguments.seconds:
                break
            found.append(suite.examine(fault))
            if found[-1]["wrong"]:
                print(json.dumps(found[-1]), flush=True)
        result = {"asked_for": arguments.count, "seed": arguments.seed, **summary(suite, found)}
        result |= {
            "seconds": round(time.monotonic() - started),
            "seconds_before_the_first": round(ready),
            "software": software_versions(),
        }
        print(json.dumps(result, indent=1))
        if record:
            save(record, result)
        return int(bool(result["wrong"] or result["wrong_without_a_fault"]))


if __name__ == "__main__":
    raise SystemExit(main())
