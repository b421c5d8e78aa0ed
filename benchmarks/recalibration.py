"""How many passes over the shots the search for the coefficients needs, by minimiser, on a real
fine-tune of SmolLM2-135M.

    python recipes/smollm2-135m/prepare.py
    python -m benchmarks.recalibration                        # the record `module`
    python -m benchmarks.recalibration --granularity layer    # the record `layer`

Fine-tunes on drug reviews by the recipe (or takes `--model`), then minimises the objective of
`recalibration/objective.py` from the same start with each minimiser. A pass is one evaluation of
loss and gradient over all fitting shots, which is all that the search costs. `passes_to_1_percent`
is how many it takes to come within 1 % of the lowest objective that any of them found, and
`passes_to_1_percent_of_gain` within 1 % of the way from the start to there.
"""

import argparse
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy.optimize import minimize

from safegene_trl.checkpoints.loading import load_model, load_tokenizer
from safegene_trl.config.data import DataConfig
from safegene_trl.config.search import SearchConfig
from safegene_trl.config.settings import SafeGeneConfig
from safegene_trl.data.shots import gather_shots
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.models.attachment import VectorAttachment, frozen_for_calibration
from safegene_trl.models.inputs import padding_id
from safegene_trl.provenance import software_versions
from safegene_trl.recalibration.objective import Objective, Passes, evaluate_objective
from safegene_trl.recalibration.trust_region import minimize_in_box
from safegene_trl.vectors.safety_vector import SafetyVector

from . import records
from .records import RESULTS


ROOT = Path(__file__).resolve().parents[1]
RECIPE, BUILD = ROOT / "recipes" / "smollm2-135m", ROOT / "build" / "smollm2-135m"
LOWER, UPPER = 0.0, 2.0


class Enough(Exception):
    """The passes are used up."""


def fine_tuned(folder: Path) -> float:
    """Fine-tunes by the recipe without the safety step; returns the seconds of a training step."""
    recipe = yaml.safe_load((RECIPE / "sft.yaml").read_text())
    del recipe["safegene"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(folder)}))
    command = [sys.executable, "-m", "safegene_trl", "sft", "--config", str(folder / "sft.yaml")]
    done = subprocess.run(
        command, check=True, cwd=ROOT, timeout=7200, capture_output=True, text=True
    )
    return float(done.stdout.split("'train_runtime': '")[1].split("'")[0]) / recipe["max_steps"]


def lbfgs(evaluate, start, passes):
    minimize(
        lambda point: evaluate(point)[:2],
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(LOWER, UPPER)] * len(start),
        options={"maxfun": passes, "ftol": 1e-9, "gtol": 1e-9},
    )


def adam(rate, evaluate, start, passes):
    point = torch.tensor(start)
    optimizer = torch.optim.Adam([point], lr=rate)
    while True:
        point.grad = torch.tensor(evaluate(point.numpy().copy())[1])
        optimizer.step()
        point.clamp_(LOWER, UPPER)


def levenberg_marquardt(evaluate, start, passes):
    """The Gauss–Newton matrix anew at every accepted point, damped by what the last step taught."""
    point, damping = start, 0.1
    value, gradient, rows = evaluate(point)
    while True:
        matrix = rows.T @ rows
        own = np.diag(np.diag(matrix) + np.trace(matrix) / len(start) / 10)
        found = minimize(
            lambda step, g=gradient, b=matrix + damping * own: (
                g @ step + step @ b @ step / 2,
                g + b @ step,
            ),
            np.zeros(len(start)),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(LOWER - point, UPPER - point, strict=True)),
        ).x
        new = evaluate(np.clip(point + found, LOWER, UPPER))
        if new[0] < value:
            point, (value, gradient, rows), damping = (
                np.clip(point + found, LOWER, UPPER),
                new,
                damping / 3,
            )
        else:
            damping *= 10


def ours(evaluate, start, passes):
    minimize_in_box(evaluate, start, LOWER, UPPER, passes)


MINIMISERS = {
    "gauss_newton_bfgs": ours,
    "l_bfgs_b": lbfgs,
    "levenberg_marquardt": levenberg_marquardt,
    "adam_0.1": partial(adam, 0.1),
    "adam_0.03": partial(adam, 0.03),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="A finished fine-tune. Default: one is trained.")
    parser.add_argument("--vector", type=Path, default=RECIPE / "safety-vector")
    parser.add_argument(
        "--granularity", default=SearchConfig.granularity, choices=["layer", "module", "rank"]
    )
    parser.add_argument("--passes", type=int, default=14)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    arguments = parser.parse_args()
    folder, step_seconds = arguments.model, None
    if folder is None:
        folder = ROOT / "build" / "recalibration" / "fine-tuned"
        step_seconds = fine_tuned(folder)
    config = SafeGeneConfig(
        vector=str(arguments.vector),
        search=SearchConfig(granularity=arguments.granularity),
        data=DataConfig(
            task_data=str(BUILD / "reviews_train.jsonl"),
            num_safety_shots=24,
            num_benign_shots=12,
            num_task_shots=12,
        ),
    )
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    sharding = Sharding(
        torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    )
    model.to(sharding.device)
    vector = SafetyVector.from_pretrained(config.vector)
    shots = gather_shots(config, vector, tokenizer, None, None)
    attachment = VectorAttachment(
        model, vector.deltas, vector.space(config.search.granularity), sharding
    )
    unique = attachment.space.names
    start = np.full(len(unique), config.search.start)
    runs = {}
    with frozen_for_calibration(model):
        passes = Passes(padding_id(tokenizer))
        fit = Objective(model, shots.data, "fit", config, passes, sharding)
        for name, run in MINIMISERS.items():
            values, seconds = [], []

            def evaluate(point, values=values, seconds=seconds):
                if len(values) == arguments.passes:
                    raise Enough
                started = time.perf_counter()
                value, _, gradient, rows = evaluate_objective(
                    model, fit, attachment.applied, point, config
                )
                seconds.append(time.perf_counter() - started)
                values.append(value)
                return value, gradient, rows

            with suppress(Enough):
                run(evaluate, start, arguments.passes)
            runs[name] = {"objective": values, "seconds": seconds}
            print(name, [round(value, 4) for value in values], flush=True)
    write(arguments.results, runs, step_seconds, config, len(unique))


def write(
    results: Path, runs: dict, step_seconds: float | None, config: SafeGeneConfig, unknowns: int
) -> None:
    lowest = min(min(run["objective"]) for run in runs.values())
    for run in runs.values():
        first = run["objective"][0]
        for key, near in (
            ("passes_to_1_percent", 1.01 * lowest),
            ("passes_to_1_percent_of_gain", lowest + 0.01 * (first - lowest)),
        ):
            run[key] = next(
                (i + 1 for i, value in enumerate(run["objective"]) if value <= near), None
            )
    own = runs["gauss_newton_bfgs"]
    pass_seconds = float(np.median(own["seconds"]))
    record = {
        "lowest_objective": lowest,
        "granularity": config.search.granularity,
        "unknowns": unknowns,
        "shots": {
            "harmful": config.data.num_safety_shots,
            "benign": config.data.num_benign_shots,
            "task": config.data.num_task_shots,
        },
        "runs": runs,
        "pass_seconds": pass_seconds,
        "training_step_seconds": step_seconds,
        "training_steps_of_which_the_search_is_3_percent": None
        if not step_seconds
        else round(len(own["objective"]) * pass_seconds / step_seconds / 0.03),
        "aims": {"passes": 5, "reached": own["passes_to_1_percent"], "share_of_fine_tune": 0.03},
        "threads": torch.get_num_threads(),
        "software": software_versions(),
    }
    records.write("recalibration", config.search.granularity, record, results)


if __name__ == "__main__":
    main()
