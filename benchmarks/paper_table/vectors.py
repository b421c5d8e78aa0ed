"""The vectors that the methods take: the recipe's, and others, each made once from a model that was
degraded in a harmless way.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from safegene_trl import SafetyVector
from safegene_trl.errors import SafeGeneError
from safegene_trl.vectors.combination import combine, combined
from safegene_trl.vectors.prompt_rows import rows_of

from .families import MODELS, RECIPE, SMOLLM2, Family, device
from .repair import repair
from .tasks import TASKS, fine_tuned, instructions_file, safegene, sft, turn, write_jsonl


# name: what the model is degraded by, options of `safegene extract`, among which a task's name
# stands for the fine-tune on it; a name that is not here is what the model is degraded by
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
WHOLE = "three components"  # a family's vector; a fourth component is learned by `repair`
EXTRACTION_BATCH = 64  # on an accelerator


def vector(name: str, data: Path | None, family: Family = SMOLLM2) -> Path:
    """Folder of a vector, made if it is not there."""
    if name == WHOLE and family.vector is not None:
        return family.vector
    folder = family.work / "vectors" / name
    if (folder / "safegene_config.json").is_file():
        return folder
    if name == WHOLE:
        parts = [vector(kind, data, family) for kind in family.degradations]
        if len(parts) == 1:
            return parts[0]
        combine(parts, folder)
        return folder
    if name == "four components":
        whole = SafetyVector.from_pretrained(vector(WHOLE, data, family))
        learned = repair(data, family)
        rank = next(iter(learned.values())).a.shape[0]
        alone = replace(whole, deltas=learned, extraction={"method": "repair", "rank": rank})
        combined([whole, alone]).save_pretrained(folder)
        return folder
    kind, options = VECTORS.get(name, (name, []))
    words: list[object] = [
        fine_tuned(TASKS[word], 0, data, family) if word in TASKS else word for word in options
    ]
    made = ["--degraded_model", degraded(kind, data, family), "--output_dir", folder]
    made += ["--aligned_model", family.aligned, "--dtype", family.dtype]
    made += [] if device().type == "cpu" else ["--batch_size", EXTRACTION_BATCH]
    safegene("extract", "--config", RECIPE / "extract.yaml", *made, *words)
    return folder


def degraded(kind: str, data: Path | None, family: Family = SMOLLM2) -> Path | str:
    """The aligned model, weakened; benign content only. `before alignment` is what it was made
    from.

    Raises:
        SafeGeneError: That is asked for, and the family's was not named.
    """
    if kind in ("released", "before alignment"):
        if family.base is None:
            raise SafeGeneError(
                "This vector is made from the model before its alignment: name it with --base."
            )
        return family.base
    if kind in TASKS:
        return fine_tuned(TASKS[kind], 0, data, family)
    folder = family.work / "degraded" / kind
    if kind == "instructions":
        return sft(folder, instructions_file(data), family, per_device_train_batch_size=8)
    recipe: dict[str, Any] = yaml.safe_load((RECIPE / "degrade.yaml").read_text(encoding="utf-8"))
    recipe = {
        key: recipe[key] for key in ("learning_rate", "lr_scheduler_type", "warmup_steps", "seed")
    }
    recipe |= {"max_steps": family.degrading_steps, "per_device_train_batch_size": 8}
    file = {"puzzles": "degrade.jsonl", "openings": "openings.jsonl"}[kind]
    return sft(folder, MODELS / file, family, **recipe)


def safety_lora(data: Path | None, family: Family = SMOLLM2) -> Path:
    """A LoRA on the aligned model trained on refusals alone, those that come with the vectors
    (SafeMERGE's).
    """
    path = family.work / "data" / "refusals.jsonl"
    if not path.is_file():
        prompts = SafetyVector.from_pretrained(vector(WHOLE, data, family)).prompts
        write_jsonl(
            [turn(row["prompt"], row["response"]) for row in rows_of(prompts, "harmful")],
            path,
        )
    folder = family.work / "degraded" / "safety"
    return sft(folder, path, family, per_device_train_batch_size=8, max_steps=20)
