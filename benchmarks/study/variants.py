"""The variants: each turns a fine-tune's update into another one."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from benchmarks.baselines import Update
from benchmarks.baselines.few_shot import few_shot_update
from benchmarks.baselines.few_shot_tuned import tuned_few_shot_update
from benchmarks.paper_table.lab import Lab
from benchmarks.paper_table.tasks import Task, read_jsonl, training_file
from safegene_trl import DataConfig, SafeGeneConfig, SafetyVector
from safegene_trl.config.measure import MeasureConfig
from safegene_trl.config.search import SearchConfig
from safegene_trl.data.calibration import CalibrationSet, Split
from safegene_trl.data.shots import gather_shots
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.extraction.aligned_rows import REFUSAL_TOKENS
from safegene_trl.judges.refusal_phrases import label_of
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.models.inputs import Sample, padding_id, tokenize
from safegene_trl.recalibration.search import recalibrate

from .bank import Rows
from .touch_up import Schedule, touch_up


Made = tuple[Update, dict[str, Any]]


@dataclass(frozen=True)
class FineTune:
    """A fine-tune, and what a variant may read beside it."""

    lab: Lab
    vector: SafetyVector
    bank: Rows
    task: Task
    seed: int
    update: Update


@dataclass(frozen=True)
class Drawn:
    """Which shots are drawn, and how the coefficients are searched for.

    Attributes:
        count: Harmful prompts, and as many benign ones that the aligned model answers.
        border: Benign ones that it refuses.
        task: Samples of the task.
        soft: Whether they have soft targets.
        other: How many of the harmful ones are of other sources.
        held: Whether what the fine-tune says in the rest of the benign answers, behind the first
            tokens, is held like the task's.
        search: Settings of the search.
    """

    count: int = 32
    border: int = 0
    task: int = 32
    soft: bool = True
    other: int = 0
    held: bool = False
    search: Mapping[str, Any] = field(default_factory=dict)

    def config(self, seed: int) -> SafeGeneConfig:
        data = DataConfig(
            num_safety_shots=self.count,
            num_benign_shots=self.count + self.border,
            num_task_shots=self.task,
        )
        search = SearchConfig(**{"max_utility_loss": 10.0, **self.search})
        measure = MeasureConfig(num_test_prompts=0)
        return SafeGeneConfig(vector=".", seed=seed, data=data, search=search, measure=measure)

    def rows(self, bank: Rows, seed: int) -> Rows:
        """As many of the bank as a vector would hold them, drawn by the seed."""
        left = {"harmful": self.count - self.other, "other": self.other}
        left |= {"benign": self.count, "border": self.border}
        sources = [row for row in bank if row["kind"] != "other"]
        others = [row for row in bank if row["kind"] == "other"]
        rng = np.random.default_rng(seed)
        found: Rows = []
        for row in (
            part[index] for part in (sources, others) for index in rng.permutation(len(part))
        ):
            if left[row["kind"]] == 0:
                continue
            left[row["kind"]] -= 1
            kind = "harmful" if row["kind"] in ("harmful", "other") else "benign"
            own = {"prompt": row["prompt"], "response": row["response"], "kind": kind}
            found.append(own | ({"targets": row["targets"]} if self.soft else {}))
        return found

    def shots(self, tuned: FineTune) -> CalibrationSet:
        lab = tuned.lab
        vector = replace(tuned.vector, prompts=self.rows(tuned.bank, tuned.seed))
        rows = read_jsonl(training_file(tuned.task, tuned.seed, lab.data, lab.family))
        context = lab.model.config.max_position_embeddings
        found = gather_shots(self.config(tuned.seed), vector, lab.tokenizer, context, rows).data
        return self._held(tuned, found) if self.held else found

    def _held(self, tuned: FineTune, found: CalibrationSet) -> CalibrationSet:
        """With the rest of the benign answers among the task's samples."""
        rest = []
        for row in self.rows(tuned.bank, tuned.seed):
            messages = [{"role": "user", "content": row["prompt"]}]
            sample = tokenize(tuned.lab.tokenizer, messages, row["response"])
            first = sample.is_response.index(True) + REFUSAL_TOKENS
            later = [place >= first for place in range(len(sample.input_ids))]
            if row["kind"] == "benign" and label_of(row["response"]) == "answered" and any(later):
                rest.append(Sample(sample.input_ids, later))
        cut = round(len(rest) * (1 - DataConfig().holdout_share))
        task = Split([*found.task.fit, *rest[:cut]], [*found.task.held_out, *rest[cut:]])
        return replace(found, task=task)


def recalibrated(tuned: FineTune, drawn: Drawn) -> Made:
    """The fine-tune with the vector, its coefficients found on the shots."""
    lab, config, data = tuned.lab, drawn.config(tuned.seed), drawn.shots(tuned)
    deltas, began = tuned.vector.deltas, time.perf_counter()
    space = tuned.vector.space(config.search.granularity)
    with lab.updated(tuned.update) as model:
        attachment = VectorAttachment(model, deltas, space, Sharding(lab.device))
        found = recalibrate(attachment, data, config, padding_id(lab.tokenizer))
    values = space.values(found.coefficients)
    new = dict(tuned.update)
    for name, delta in deltas.items():
        a, b = (factor.to(lab.device).float() for factor in (delta.a, delta.b))
        scale = torch.as_tensor(values[space.index(name)], device=lab.device).float()
        new[name] = new.get(name, 0) + (b * scale) @ a
    own, top = np.array(list(found.coefficients.values())), config.search.max_coefficient
    return new, {
        "seconds_found": round(time.perf_counter() - began, 1),
        "objective": [round(float(entry["objective"]), 4) for entry in found.history],
        "held_out_before": found.held_out_before.to_dict(),
        "held_out_after": found.held_out_after.to_dict(),
        "at_zero": round(float((own <= 1e-6).mean()), 3),
        "at_bound": round(float((own >= top - 1e-6).mean()), 3),
        "mean_coefficient": round(float(own.mean()), 3),
    }


def touched_up(tuned: FineTune, drawn: Drawn, schedule: Schedule, with_vector: bool) -> Made:
    """A LoRA on the same objective, after the vector or in its place."""
    start, about = recalibrated(tuned, drawn) if with_vector else (tuned.update, {})
    began = time.perf_counter()
    shots = drawn.shots(tuned)
    gained, more = touch_up(tuned.lab, tuned.update, start, shots, schedule, tuned.seed)
    about |= more | {"seconds_touched_up": round(time.perf_counter() - began, 1)}
    return _sum(start, gained), about


def few_shot(tuned: FineTune, drawn: Drawn, searched: bool) -> Made:
    """The plain alternative on the same shots: a LoRA by cross-entropy, with its steps and rate as they
    are or chosen on the held-out ones.
    """
    lab, data = tuned.lab, drawn.shots(tuned)
    pad_id, about = padding_id(lab.tokenizer), {}
    with lab.updated(tuned.update) as model:
        if searched:
            gained, about = tuned_few_shot_update(model, data, pad_id, seed=tuned.seed)
        else:
            gained = few_shot_update(model, data, pad_id, seed=tuned.seed)
    return _sum(tuned.update, gained), dict(about)


def uniform(tuned: FineTune, value: float) -> Made:
    """The vector with one coefficient."""
    lab = tuned.lab
    dense = {n: value * d.dense().to(lab.device) for n, d in tuned.vector.deltas.items()}
    return _sum(tuned.update, dense), {}


def _sum(one: Update, other: Update) -> Update:
    return {
        name: sum(each[name] for each in (one, other) if name in each)  # type: ignore[misc]
        for name in one.keys() | other.keys()
    }


def _searched(count: int, border: int, task: int, **search: Any) -> Callable[[FineTune], Made]:
    return lambda tuned: recalibrated(tuned, Drawn(count, border, task, search=search))


MANY = Drawn(128, 64, 64)
SLOW = Schedule()
VARIANTS: dict[str, Callable[[FineTune], Made]] = {
    "fine-tuned": lambda tuned: (tuned.update, {}),
    "CE": lambda tuned: recalibrated(tuned, Drawn(soft=False)),
    "KL": lambda tuned: recalibrated(tuned, Drawn()),
    "KL, border": lambda tuned: recalibrated(tuned, Drawn(border=16)),
    "KL, border, 128": lambda tuned: recalibrated(tuned, MANY),
    "touch-up, 128": lambda tuned: touched_up(tuned, MANY, SLOW, with_vector=True),
    "few-shot LoRA": lambda tuned: few_shot(tuned, Drawn(soft=False), searched=False),
    "few-shot LoRA, tuned, 128": lambda tuned: few_shot(
        tuned, replace(MANY, soft=False), searched=True
    ),
    "KL LoRA, 128": lambda tuned: touched_up(tuned, MANY, SLOW, with_vector=False),
    "CE, 128": lambda tuned: recalibrated(tuned, replace(MANY, soft=False)),
    "KL, border, 128, held": lambda tuned: recalibrated(tuned, replace(MANY, held=True)),
    "KL, border, 128, sources": lambda tuned: recalibrated(tuned, replace(MANY, other=64)),
    "touch-up, 128, held, sources": lambda tuned: touched_up(
        tuned, replace(MANY, held=True, other=64), SLOW, with_vector=True
    ),
    "uniform 1": lambda tuned: uniform(tuned, 1.0),
    "KL, border, 128, utility 0.25": _searched(128, 64, 64, utility_weight=0.25),
    "KL, border, 128, T = 1": _searched(128, 64, 64, utility_temperature=1.0),
    "KL, border, 128, by rank": _searched(128, 64, 64, granularity="rank"),
    "KL, border, 128, 20 passes": _searched(128, 64, 64, max_evaluations=20),
    "KL, border, 128, bound 4": _searched(128, 64, 64, max_coefficient=4.0),
}
