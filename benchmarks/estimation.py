"""What `safegene estimate` tells against what the command then takes, on a real fine-tune of
SmolLM2-135M.

    python recipes/smollm2-135m/prepare.py
    python -m benchmarks.estimation

Fine-tunes on drug reviews by the recipe (or takes `--model`), then estimates and applies the safety
step in turn. A ratio is the estimate over what the report then says; above 1 the estimate was too
high. The search may end early, and answers do: both are not known beforehand. The tests compare
operations, which no other work on the machine disturbs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safegene_trl.provenance import software_versions

from . import records
from .recalibration import BUILD, RECIPE, ROOT, fine_tuned
from .records import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="A finished fine-tune. Default: one is trained.")
    parser.add_argument("--vector", type=Path, default=RECIPE / "safety-vector")
    parser.add_argument("--task_data", type=Path, default=BUILD / "reviews_train.jsonl")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    arguments = parser.parse_args()
    model = arguments.model
    if model is None:
        model = ROOT / "build" / "recalibration" / "fine-tuned"
        fine_tuned(model)
    settings: dict[str, Any] = {
        "data.num_safety_shots": 16,
        "data.num_benign_shots": 8,
        "data.num_task_shots": 16,
    }
    settings |= {
        "measure.num_test_prompts": 16,
        "search.max_utility_loss": 10,
        "allow_other_base": True,
    }
    files = {"vector": arguments.vector, "data.task_data": arguments.task_data}
    words = ["apply", "--model_name_or_path", model]
    words += [
        word for key, value in (files | settings).items() for word in (f"--safegene.{key}", value)
    ]
    runs: list[dict[str, Any]] = []
    for _ in range(arguments.repetitions):
        runs.append(run(words))
        write(arguments.results, runs, settings)


def write(results: Path, runs: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    record = {
        "runs": runs,
        "median_ratio": {
            step: {
                key: statistics.median(each[step]["ratio"][key] for each in runs)
                for key in runs[0][step]["ratio"]
            }
            for step in runs[0]
        },
        "aim": "between 0.75 and 1.25",
        "settings": settings,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "software": software_versions(),
    }
    records.write("estimation", None, record, results)
    print(json.dumps(record["median_ratio"]))


def run(words: list[Any]) -> dict[str, Any]:
    """Per step: what was estimated, what was taken and the ratios of the two."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        words = [*words, "--safegene.output.output_dir", out]
        safegene("estimate", *words, "--json", Path(place) / "costs.json")
        costs = json.loads((Path(place) / "costs.json").read_text(encoding="utf-8"))
        safegene(*words)
        report = json.loads((out / "safegene_report.json").read_text(encoding="utf-8"))
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    found = {}
    for step, cost in costs.items():
        taken = {
            "seconds": report["phases"][step]["seconds"],
            "memory": report["phases"][step]["peak_memory_mib"] * 2**20,
        }
        taken |= {"disk": size} if step == "save" else {}
        ratios = {key: round(cost[key] / value, 3) for key, value in taken.items()}
        found[step] = {
            "estimated": {key: cost[key] for key in taken},
            "taken": taken,
            "ratio": ratios,
        }
    return found


def safegene(*words: Any) -> None:
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # the C library gives back at once what tensors no longer need
    command = [sys.executable, "-m", "safegene_trl", *map(str, words)]
    subprocess.run(
        command, check=True, env=environment, cwd=ROOT, timeout=7200, stdout=subprocess.DEVNULL
    )


if __name__ == "__main__":
    main()
