"""The vectors that the methods take: the recipe's, and others, each made once from a model that was
degraded in a harmless way.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from safegene_trl import SafetyVector
from safegene_trl.vectors.combination import combined

from .repair import repair
from .tasks import MODELS, RECIPE, TASKS, WORK, fine_tuned, safegene, sft, turn, write_jsonl


# name: what the model is degraded by, options of `safegene extract`, among which a task's name
# stands for the fine-tune on it
VECTORS: dict[str, tuple[str, list[str]]] = {
    "puzzles": ("puzzles", []),
    "before alignment": ("released", []),
    "openings": ("openings", []),
    "puzzles, distilled": (
        "puzzles",
        ["--method", "distill", "--distill_steps", "30", "--batch_size", "8"],
    ),
    "puzzles, linearized": (
        "puzzles",
        ["--method", "linearized", "--distill_steps", "30", "--batch_size", "8"],
    ),
    "puzzles, rank 2": ("puzzles", ["--rank", "2"]),
    "puzzles, rank 4": ("puzzles", ["--rank", "4"]),
    "puzzles, isolated from other tasks": ("puzzles", ["--isolate_from", "ag_news", "alpaca"]),
    "puzzles, layers by contrast": (
        "puzzles",
        ["--selection", "activation_contrast", "--layer_share", "0.5"],
    ),
    "puzzles, layers by gradient": ("puzzles", ["--selection", "gradient", "--layer_share", "0.5"]),
    "puzzles, layers by size": ("puzzles", ["--selection", "magnitude", "--layer_share", "0.5"]),
    "puzzles, layers at random": ("puzzles", ["--selection", "random", "--layer_share", "0.5"]),
    **{task: (task, []) for task in TASKS},  # a fine-tune as the degradation
}
SHIPPED = (
    RECIPE / "safety-vector"
)  # three components: puzzles, before alignment and openings; a fourth is learned by `repair`


def vector(name: str, data: Path | None) -> Path:
    """Folder of a vector, made if it is not there."""
    folder = SHIPPED if name == "three components" else WORK / "vectors" / name
    if (folder / "safegene_config.json").is_file():
        return folder
    if name == "four components":
        shipped, learned = SafetyVector.from_pretrained(SHIPPED), repair(data)
        rank = next(iter(learned.values())).a.shape[0]
        alone = replace(shipped, deltas=learned, extraction={"method": "repair", "rank": rank})
        combined([shipped, alone]).save_pretrained(folder)
        return folder
    kind, options = VECTORS[name]
    words = [fine_tuned(TASKS[word], 0, data) if word in TASKS else word for word in options]
    made = ["--degraded_model", degraded(kind, data), "--output_dir", folder]
    safegene("extract", "--config", RECIPE / "extract.yaml", *made, *words)
    return folder


def degraded(kind: str, data: Path | None) -> Path:
    """The aligned model, weakened; benign content only. `released` is the model before its
    alignment.
    """
    if kind == "released":
        return MODELS / "released"
    if kind in TASKS:
        return fine_tuned(TASKS[kind], 0, data)
    recipe: dict[str, Any] = yaml.safe_load((RECIPE / "degrade.yaml").read_text(encoding="utf-8"))
    recipe = {
        key: recipe[key]
        for key in ("max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed")
    }
    file = {"puzzles": "degrade.jsonl", "openings": "openings.jsonl"}[kind]
    return sft(WORK / "degraded" / kind, MODELS / file, per_device_train_batch_size=8, **recipe)


def safety_lora(data: Path | None) -> Path:
    """A LoRA on the aligned model trained on refusals alone, those that come with the vectors
    (SafeMERGE's).
    """
    path = WORK / "data" / "refusals.jsonl"
    if not path.is_file():
        prompts = SafetyVector.from_pretrained(SHIPPED).prompts
        write_jsonl(
            [turn(row["prompt"], row["response"]) for row in prompts if row["kind"] == "harmful"],
            path,
        )
    return sft(WORK / "degraded" / "safety", path, per_device_train_batch_size=8, max_steps=20)
