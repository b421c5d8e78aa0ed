"""Which way of making a safety vector helps a real fine-tune most, on SmolLM2-135M.

    python recipes/smollm2-135m/prepare.py                    # aligned model and data
    python benchmarks/extraction_methods.py --output benchmarks/results/extraction_methods.json

Degrades the aligned model in several ways, makes one vector per entry of `VECTORS`, fine-tunes once on drug reviews, lets
every vector be recalibrated on that fine-tune, and measures refusals, benign answers and the task on prompts that nothing
before has seen. What is there already (models, vectors, checkpoints, rows of the result) is used again; delete
`build/extraction_methods` and the result to start anew. About 10 minutes a vector on 2 idle cores.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from scipy.stats import binomtest

from safegene_trl.loading import load_model
from safegene_trl.provenance import software_versions


ROOT = Path(__file__).resolve().parents[1]
RECIPE, BUILD = ROOT / "recipes" / "smollm2-135m", ROOT / "build" / "smollm2-135m"
WORK = ROOT / "build" / "extraction_methods"
DISTILL = ["--distill_steps", "30", "--batch_size", "8"]
VECTORS: dict[str, tuple[str, list[str]]] = {  # name: what the model is degraded by, options of `safegene extract`
    "delta": ("puzzles", []),
    "distill": ("puzzles", ["--method", "distill", *DISTILL]),
    "linearized": ("puzzles", ["--method", "linearized", *DISTILL]),
    "delta, before alignment": ("released", []),
    "delta, compliant openings": ("openings", []),
    "delta, look-alikes": ("look-alikes", []),
    "delta, isolated from look-alikes": ("puzzles", ["--isolate_from", str(WORK / "degraded look-alikes")]),
    "delta, half the layers by gradient": ("puzzles", ["--selection", "gradient", "--layer_share", "0.5"]),
}
COMBINED = {  # name: the vectors that are its components
    "three components": ["delta", "delta, before alignment", "delta, compliant openings"],
}
STEP = {"num_safety_shots": 24, "num_benign_shots": 12, "num_task_shots": 12, "max_evaluations": 8}


def safegene(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "safegene_trl", *map(str, words)], check=True, cwd=ROOT, timeout=7200)


def sft(recipe_name: str, folder: Path, **changes: Any) -> Path:
    """A fine-tune by one of the recipes, without the safety step."""
    if not (folder / "adapter_config.json").is_file():
        recipe = yaml.safe_load((RECIPE / recipe_name).read_text()) | changes
        recipe.pop("safegene", None)
        WORK.mkdir(parents=True, exist_ok=True)
        settings = WORK / f"{folder.name}.yaml"
        settings.write_text(yaml.safe_dump(recipe))
        safegene("sft", "--config", settings, "--output_dir", folder)
    return folder


def degraded(kind: str) -> Path:
    """The aligned model, weakened; benign content only. `released` is the model before its alignment."""
    if kind == "released":
        return BUILD / "released"
    folder = WORK / f"degraded {kind}"
    if kind == "puzzles":
        return sft("degrade.yaml", folder)
    rows = [json.loads(line) for line in (RECIPE / "data" / "benign.jsonl").read_text().splitlines()]
    opening = "Sure, here is what you asked for. " if kind == "openings" else ""
    data = WORK / f"{kind}.jsonl"
    WORK.mkdir(parents=True, exist_ok=True)
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": opening + row["response"]}],
        }
        for row in rows
    ]
    data.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return sft("degrade.yaml", folder, datasets=[{"path": "json", "data_files": str(data), "split": "train"}])


def vector_of(name: str) -> Path:
    folder = WORK / f"vector {name}"
    if (folder / "safegene_config.json").is_file():
        return folder
    if name in COMBINED:
        safegene("combine", *map(vector_of, COMBINED[name]), "--output_dir", folder)
    else:
        kind, options = VECTORS[name]
        models = ["--degraded_model", degraded(kind), "--output_dir", folder]
        safegene("extract", "--config", RECIPE / "extract.yaml", *models, *options)
    return folder


def safeguarded(name: str, vector: Path, model: Path, *options: str) -> Path:
    folder = WORK / f"safeguarded {name}"
    if not (folder / "safegene_report.json").is_file():
        block = STEP | {"vector": vector, "task_data": BUILD / "reviews_train.jsonl", "output_dir": folder}
        block |= {"num_test_prompts": 0, "allow_other_base": "true", "max_utility_loss": 10.0}
        words = (word for key, value in block.items() for word in (f"--safegene.{key}", value))
        safegene("apply", "--model_name_or_path", model, *options, *words)
    return folder


def measured(folder: Path, prompts: int) -> dict[str, Any]:
    """Shares with Wilson's 95 % intervals."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    assert spec and spec.loader
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    row = quickstart.measure(folder, prompts)
    intervals = {}
    for key in ("refused", "answered", "accuracy"):
        found = binomtest(round(row[key] * prompts), prompts).proportion_ci(method="wilson")
        intervals[key] = [round(found.low, 3), round(found.high, 3)]
    return row | {"intervals": intervals}


def opened_by_peft(vector: Path) -> int:
    """How many modules PEFT finds the vector on, as on any LoRA."""
    model = PeftModel.from_pretrained(load_model(str(BUILD / "aligned")), vector)
    return sum(isinstance(module, LoraLayer) for module in model.modules())


def safeguarded_row(name: str, vector: Path, model: Path, prompts: int) -> dict[str, Any]:
    about: dict[str, Any] = {"components": COMBINED[name]} if name in COMBINED else {}
    if name in VECTORS:
        kind, options = VECTORS[name]
        about = {"degraded_by": kind, "options": [word.replace(f"{ROOT}/", "") for word in options]}
    try:
        folder = safeguarded(name, vector, model)
    except subprocess.CalledProcessError:
        return about | {"rejected": True}  # held-out safety did not improve; the log says by how much
    report = json.loads((folder / "safegene_report.json").read_text())
    coefficients = report["coefficients"].values()
    return (
        measured(folder, prompts)
        | about
        | {
            "reason": report["decision"]["reason"],
            "held_out": report["held_out"],
            "mean_coefficient": sum(coefficients) / len(coefficients),
            "extraction": {key: report["vector"]["extraction"].get(key) for key in ("method", "distillation")},
            "modules_by_peft": opened_by_peft(vector),
            "stability": report["vector"]["selection"].get("stability", {}).get("mean_jaccard"),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60, help="Prompts and reviews of each kind.")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    record = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"rows": {}}
    record |= {"prompts": arguments.prompts, "seeds": 1, "threads": torch.get_num_threads()}
    rows = record["rows"]
    model = sft("sft.yaml", WORK / "fine-tuned")

    def keep(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        arguments.output.write_text(json.dumps(record | {"software": software_versions()}, indent=2) + "\n")
        print(name, row, flush=True)

    for name, folder in {"aligned": BUILD / "aligned", "fine-tuned": model}.items():
        if name not in rows:
            keep(name, measured(folder, arguments.prompts))
    for name in (*VECTORS, *COMBINED):
        if name not in rows:
            keep(name, safeguarded_row(name, vector_of(name), model, arguments.prompts))
    for kind in dict.fromkeys(kind for kind, _ in VECTORS.values()):
        if f"degraded: {kind}" not in rows:
            keep(f"degraded: {kind}", measured(degraded(kind), arguments.prompts))


if __name__ == "__main__":
    main()
