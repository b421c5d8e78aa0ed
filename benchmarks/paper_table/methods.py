"""The rows of the table: each turns a fine-tune's update into another one."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.baselines import Update
from benchmarks.baselines.antidote import antidote
from benchmarks.baselines.controls import random_layers, random_vector
from benchmarks.baselines.enchtable import enchtable
from benchmarks.baselines.few_shot import few_shot_update
from benchmarks.baselines.few_shot_tuned import tuned_few_shot_update
from benchmarks.baselines.held_out import held_out_loss
from benchmarks.baselines.lssf import lssf
from benchmarks.baselines.one_shot import one_shot_update
from benchmarks.baselines.resta import resta
from benchmarks.baselines.safe_delta import safe_delta
from benchmarks.baselines.safelora import safelora
from benchmarks.baselines.safemerge import safemerge
from benchmarks.baselines.salora import insert
from benchmarks.baselines.wise_ft import chosen_wise_ft, wise_ft
from safegene_trl import SafeGeneConfig, SafetyVector
from safegene_trl.data.prompts import kept_apart, load_prompts
from safegene_trl.data.rows import conversation
from safegene_trl.models.inputs import Sample, batches, padding_id, tokenize
from safegene_trl.models.losses import cross_entropy
from safegene_trl.provenance import sha256_of_json

from .lab import SHOTS, Lab
from .tasks import (
    TASKS,
    Task,
    batch_size,
    fine_tuned,
    prompt_source,
    read_jsonl,
    safegene,
    training_file,
    training_steps,
    write_jsonl,
)
from .vectors import VECTORS, WHOLE, safety_lora, vector


Made = tuple[Update, dict[str, Any]]  # the update and what is to be said about it
BY_LAYER: dict[str, Any] = {
    "search.granularity": "layer",
    "search.utility_temperature": 1.0,
    "search.max_evaluations": 8,
}  # the paper's coefficients
SALORA_MODULES = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # of its authors' code


def plain(lab: Lab, task: Task, seed: int) -> Made:
    return lab.update_of(fine_tuned(task, seed, lab.data, lab.family)), {}


def aligned(lab: Lab, task: Task, seed: int) -> Made:
    return {}, {}


def safegene_row(lab: Lab, task: Task, seed: int, vector_name: str, **options: Any) -> Made:
    """`safegene apply` on the finished adapter, as a user would run it."""
    return applied(lab, task, seed, vector(vector_name, lab.data, lab.family), **options)


def applied(lab: Lab, task: Task, seed: int, vector_folder: Path, **options: Any) -> Made:
    block, folder = settings(lab, task, seed, vector_folder, **options)
    model = fine_tuned(task, seed, lab.data, lab.family)
    runs = not (folder / "safegene_report.json").is_file()
    if runs:
        words = [word for key, value in block.items() for word in (f"--safegene.{key}", value)]
        try:
            safegene(
                "apply",
                "--model_name_or_path",
                model,
                "--dtype",
                lab.family.dtype,
                "--safegene.output.output_dir",
                folder,
                *words,
            )
        except subprocess.CalledProcessError as error:
            if "held-out" not in (error.stderr or ""):
                raise
            return lab.update_of(model), {"rejected": error.stderr.strip().splitlines()[-1]}
    report = json.loads((folder / "safegene_report.json").read_text(encoding="utf-8"))
    adapter = (
        folder / "adapter" if (folder / "adapter" / "adapter_config.json").is_file() else folder
    )
    about = {"held_out": report["held_out"], "reason": report["decision"]["reason"]}
    about["coefficients"] = {key: round(value, 4) for key, value in report["coefficients"].items()}
    # one per pass over the shots
    about["objective"] = [round(entry["objective"], 5) for entry in report["history"]]
    about["recalibration_seconds"] = report["phases"]["recalibrate"]["seconds"]
    about["measured"] = report["measured"]  # what the report promises, for `calibration`
    if runs:
        about["measuring_seconds"] = report["phases"]["measure"]["seconds"]
    return lab.update_of(adapter), about


def settings(
    lab: Lab, task: Task, seed: int, vector_folder: Path, **options: Any
) -> tuple[dict[str, Any], Path]:
    """The settings of a run of `safegene apply`, and its folder: one of its own for all settings,
    defaults included.
    """
    block: dict[str, Any] = {f"data.{key}": count for key, count in SHOTS.items()}
    block |= {
        "vector": str(vector_folder),
        "data.task_data": str(training_file(task, seed, lab.data, lab.family)),
        "seed": seed,
    }
    block |= {
        "output.output_format": "adapter",
        "search.max_utility_loss": 10.0,
    }
    if lab.family.vector is not None:  # made on another machine, as its aligned model was
        block["allow_other_base"] = True
    block |= options
    config: dict[str, Any] = {}
    for path, value in block.items():
        group, _, key = path.rpartition(".")
        (config.setdefault(group, {}) if group else config)[key] = value
    every = sha256_of_json(SafeGeneConfig(**config).to_dict())[:8]
    return (
        block,
        lab.family.work / "safeguarded" / f"{task.name}-{seed}-{vector_folder.name}-{every}",
    )


def shots(count: int) -> dict[str, int]:
    """As many of every kind."""
    return {f"data.{key}": count for key in SHOTS}


def many_shots_row(lab: Lab, task: Task, seed: int, count: int) -> Made:
    """More harmful shots than come with the vector: prompts of CategoricalHarmfulQA that repeat no
    evaluated one, with the vector's refusals; all of its benign prompts."""
    path = lab.family.work / "data" / "more_harmful.jsonl"
    if not path.is_file():
        found = load_prompts(
            prompt_source("harmful/catqa.jsonl", lab.data), "harmful", "train", None, 0
        )
        evaluated = [prompt.text for prompts in lab.prompts.values() for prompt in prompts]
        write_jsonl([{"prompt": prompt.text} for prompt in kept_apart(found, evaluated)[0]], path)
    return ONE_COMPONENT(lab, task, seed, **{"data.safety_data": str(path)}, **shots(count))


def warm_start_row(lab: Lab, task: Task, seed: int) -> Made:
    """The search starts where that on another task ended, as release after release does."""
    other = TASKS["ag_news" if task.name == "sst2" else "sst2"]
    folder = lab.vector
    applied(lab, other, seed, folder)
    report = settings(lab, other, seed, folder)[1] / "safegene_report.json"
    return applied(lab, task, seed, folder, **{"search.warm_start": str(report)})


def dense(vector_folder: Path, lab: Lab) -> Update:
    return {
        name: delta.dense().to(lab.device)
        for name, delta in SafetyVector.from_pretrained(vector_folder).deltas.items()
    }


def safelora_row(lab: Lab, task: Task, seed: int) -> Made:
    return safelora(plain(lab, task, seed)[0], lab.alignment), {"threshold": 0.5, "least": 10}


def safemerge_row(lab: Lab, task: Task, seed: int) -> Made:
    safety = lab.update_of(safety_lora(lab.data, lab.family))
    update = safemerge(plain(lab, task, seed)[0], safety, lab.alignment)
    return update, {"threshold": 0.35, "weight": 0.8}


def resta_row(lab: Lab, task: Task, seed: int, weight: float, drop: float) -> Made:
    update = resta(
        plain(lab, task, seed)[0],
        dense(vector("puzzles", lab.data, lab.family), lab),
        weight,
        drop,
        seed,
    )
    return update, {"weight": weight, "drop": drop}


def enchtable_row(lab: Lab, task: Task, seed: int) -> Made:
    factors = lab.factors_of(fine_tuned(task, seed, lab.data, lab.family))
    deltas = SafetyVector.from_pretrained(
        vector("puzzles, linearized", lab.data, lab.family)
    ).deltas
    update = enchtable(factors, deltas)
    return {name: matrix.to(lab.device) for name, matrix in update.items()}, {"beta": 0.1}


def safe_delta_row(lab: Lab, task: Task, seed: int, budget: float) -> Made:
    moments = lab.moments(lab.refusals(), responses_only=True)
    return safe_delta(plain(lab, task, seed)[0], moments, budget), {"budget": budget}


def antidote_row(lab: Lab, task: Task, seed: int, share: float) -> Made:
    update = plain(lab, task, seed)[0]
    prompts = [
        Sample(s.input_ids, [True] * len(s.input_ids)) for s in map(_prompt_only, lab.refusals())
    ]
    with lab.updated(update):
        moments = lab.moments(prompts, responses_only=False)
    weights = {name: lab.weight(name) for name in update}
    return antidote(update, weights, moments, share), {"share": share}


def _prompt_only(sample: Sample) -> Sample:
    end = sample.is_response.index(True)
    return Sample(sample.input_ids[:end], sample.is_response[:end])


def few_shot_row(lab: Lab, task: Task, seed: int, steps: int) -> Made:
    update = plain(lab, task, seed)[0]
    shots = lab.shots(task, seed).data
    with lab.updated(update) as model:
        gained = few_shot_update(model, shots, padding_id(lab.tokenizer), steps=steps, seed=seed)
    return {name: matrix + gained[name] for name, matrix in update.items()}, {"steps": steps}


def tuned_few_shot_row(lab: Lab, task: Task, seed: int) -> Made:
    update = plain(lab, task, seed)[0]
    shots, pad_id = lab.shots(task, seed).data, padding_id(lab.tokenizer)
    with lab.updated(update) as model:
        gained, about = tuned_few_shot_update(model, shots, pad_id, seed=seed)
    return {name: matrix + gained[name] for name, matrix in update.items()}, about


def one_shot_row(lab: Lab, task: Task, seed: int) -> Made:
    update = plain(lab, task, seed)[0]
    shots = lab.shots(task, seed).data
    with lab.updated(update) as model:
        gained, about = one_shot_update(model, shots, padding_id(lab.tokenizer), seed)
    return {name: matrix + gained[name] for name, matrix in update.items()}, about


def wise_ft_row(lab: Lab, task: Task, seed: int) -> Made:
    """With the α that the held-out shots prefer."""
    shots = lab.shots(task, seed).data

    def loss(update: Update) -> float:
        with lab.updated(update) as model:
            return held_out_loss(model, shots, padding_id(lab.tokenizer))

    return chosen_wise_ft(plain(lab, task, seed)[0], loss)


def half_way_row(lab: Lab, task: Task, seed: int) -> Made:
    return wise_ft(plain(lab, task, seed)[0], 0.5), {"alpha": 0.5}


def lssf_row(lab: Lab, task: Task, seed: int) -> Made:
    safety = dense(vector("puzzles", lab.data, lab.family), lab)
    moments = lab.moments(lab.refusals(), responses_only=True)
    weights = {name: lab.weight(name) for name in safety}
    update, ranks = lssf(plain(lab, task, seed)[0], safety, weights, moments)
    return update, {"kept": 0.85, "weight": 1.0, "ranks": ranks}


def salora_row(lab: Lab, task: Task, seed: int) -> Made:
    """Trains on the same rows, in the same number of steps, at the same rate as the plain
    fine-tune.
    """
    path = lab.family.work / "fine-tuned" / f"{task.name}-{seed}-salora.safetensors"
    if not path.is_file():
        samples = [
            tokenize(lab.tokenizer, *conversation(row))
            for row in read_jsonl(training_file(task, seed, lab.data, lab.family))
        ]  # type: ignore[arg-type]
        longest = lab.family.max_length
        samples = [Sample(s.input_ids[:longest], s.is_response[:longest]) for s in samples]
        samples = [sample for sample in samples if any(sample.is_response[1:])]
        safety = lab.moments(lab.refusals(), responses_only=True)
        safety = {name: moment for name, moment in safety.items() if name.endswith(SALORA_MODULES)}
        task_moments = lab.moments(samples[:128], responses_only=True)
        layers = insert(lab.model, safety, task_moments, lab.family.rank)
        try:
            steps = training_steps(task, lab.family)
            _train(lab, samples, batch_size(task, lab.family), steps, seed)
            save_file(
                {name: layer.update().cpu().contiguous() for name, layer in layers.items()}, path
            )
        finally:
            for name, layer in layers.items():
                lab.model.set_submodule(name, layer.base)
            lab.model.eval()
    return {name: matrix.to(lab.device) for name, matrix in load_file(path).items()}, {
        "rank": 2 * lab.family.rank,
        "safety_rank": 32,
        "modules": SALORA_MODULES,
    }


def _train(lab: Lab, samples: list[Sample], size: int, steps: int, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parameters = [p for p in lab.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lab.family.learning_rate, weight_decay=0.0)
        order = [i for _ in range(steps) for i in torch.randperm(len(samples)).tolist()][
            : steps * size
        ]
        lab.model.train()
        for start in range(0, len(order), size):
            chosen = [samples[i] for i in order[start : start + size]]
            (batch,) = batches(chosen, size, padding_id(lab.tokenizer), lab.device)
            (cross_entropy(lab.model, batch).sum() / batch.target_mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def random_vector_row(lab: Lab, task: Task, seed: int) -> Made:
    """One component's norm in random directions, recalibrated by layer like the component itself."""
    folder = lab.family.work / "vectors" / f"random {seed}"
    if not (folder / "safegene_config.json").is_file():
        real = SafetyVector.from_pretrained(vector("puzzles", lab.data, lab.family))
        replace(real, deltas=random_vector(real.deltas, seed)).save_pretrained(folder)
    return applied(lab, task, seed, folder, **BY_LAYER)


def random_layers_row(lab: Lab, task: Task, seed: int) -> Made:
    """One component in half of the layers, drawn at random."""
    folder = lab.family.work / "vectors" / f"random layers {seed}"
    if not (folder / "safegene_config.json").is_file():
        real = SafetyVector.from_pretrained(vector("puzzles", lab.data, lab.family))
        chosen = random_layers(list(real.layers), len(real.layers) // 2, seed)
        kept = {
            name: delta for name, delta in real.deltas.items() if int(name.split(".")[2]) in chosen
        }
        replace(
            real, deltas=kept, selection=real.selection | {"selected_layers": chosen}
        ).save_pretrained(folder)
    return applied(lab, task, seed, folder, **BY_LAYER)


METHODS: dict[str, Callable[[Lab, Task, int], Made]] = {
    "fine-tuned": plain,
    "SafeGene": partial(safegene_row, vector_name=WHOLE),
    "few-shot LoRA": partial(few_shot_row, steps=30),
    "few-shot LoRA, tuned": tuned_few_shot_row,
    "one-shot patch": one_shot_row,
    "SafeLoRA": safelora_row,
    "SafeMERGE": safemerge_row,
    "SaLoRA": salora_row,
    "RESTA": partial(resta_row, weight=0.5, drop=0.0),
    "RESTA + DARE": partial(resta_row, weight=0.5, drop=0.3),
    "EnchTable": enchtable_row,
    "Safe Delta": partial(safe_delta_row, budget=0.1),
    "Antidote": partial(antidote_row, share=0.05),
    "LSSF": lssf_row,
    "WiSE-FT": wise_ft_row,
    "WiSE-FT, α = 0.5": half_way_row,
    "uniform λ": partial(resta_row, weight=1.0, drop=0.0),
    "random vector": random_vector_row,
    "random layers": random_layers_row,
}
# rows that read the model before its alignment
NEED_BASE = ("SafeLoRA", "SafeMERGE", "vector: before alignment")
ONE_COMPONENT = partial(safegene_row, vector_name="puzzles", **BY_LAYER)
THREE_COMPONENTS = partial(safegene_row, vector_name=WHOLE, **BY_LAYER)
UNSOFTENED = partial(THREE_COMPONENTS, **{"search.granularity": "module"})
VARIANTS: dict[str, Callable[[Lab, Task, int], Made]] = {  # of SafeGene as it is
    "utility weight 4": partial(safegene_row, vector_name=WHOLE, **{"search.utility_weight": 4.0}),
    "warm start": warm_start_row,
    "four components": partial(safegene_row, vector_name="four components"),
    "four components, utility weight 4": partial(
        safegene_row, vector_name="four components", **{"search.utility_weight": 4.0}
    ),
    "by rank": partial(safegene_row, vector_name=WHOLE, **{"search.granularity": "rank"}),
    "by rank, utility weight 4": partial(
        safegene_row,
        vector_name=WHOLE,
        **{"search.granularity": "rank", "search.utility_weight": 4.0},
    ),
    "by layer": partial(safegene_row, vector_name=WHOLE, **{"search.granularity": "layer"}),
    "by layer, T = 1": THREE_COMPONENTS,
    "by layer, T = 1, 128 task shots, utility weight 2": partial(
        THREE_COMPONENTS, **{"data.num_task_shots": 128, "search.utility_weight": 2.0}
    ),
    **{
        f"by layer, T = 1, utility weight {w}": partial(
            THREE_COMPONENTS, **{"search.utility_weight": float(w)}
        )
        for w in (4, 16)
    },
    "T = 1": UNSOFTENED,
    **{
        f"T = 1, utility weight {w}": partial(UNSOFTENED, **{"search.utility_weight": float(w)})
        for w in (4, 16)
    },
}
ABLATIONS: dict[
    str, Callable[[Lab, Task, int], Made]
] = {  # of the least: one component, λ by layer, T = 1
    "one component": ONE_COMPONENT,
    **{
        f"vector: {name}": partial(ONE_COMPONENT, vector_name=name)
        for name in VECTORS
        if name != "puzzles"
    },
    **{f"{count} shots": partial(ONE_COMPONENT, **shots(count)) for count in (4, 8, 16, 64)},
    "128 shots": partial(many_shots_row, count=128),
    "coefficients by module": partial(ONE_COMPONENT, **{"search.granularity": "module"}),
    "without the utility term": partial(ONE_COMPONENT, **{"search.utility_weight": 0.0}),
    "without benign shots": partial(ONE_COMPONENT, **{"data.num_benign_shots": 0}),
}
