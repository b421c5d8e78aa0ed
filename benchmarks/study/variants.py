"""The variants: each turns a fine-tune's update into another one."""

import time
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.baselines import Update
from benchmarks.baselines.few_shot import few_shot_update
from benchmarks.baselines.few_shot_tuned import tuned_few_shot_update
from benchmarks.paper_table.lab import Lab
from benchmarks.paper_table.tasks import PLAIN, Task, poisoned, read_jsonl, training_file
from safegene_trl import DataConfig, SafeGeneConfig, SafetyVector
from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.config.measure import MeasureConfig
from safegene_trl.config.search import SearchConfig
from safegene_trl.data.calibration import CalibrationSet, Split
from safegene_trl.data.rows import conversation
from safegene_trl.data.shots import gather_shots
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.extraction.aligned_rows import REFUSAL_TOKENS
from safegene_trl.extraction.soft_targets import LIKELIEST
from safegene_trl.judges.refusal_phrases import label_of
from safegene_trl.models.attachment import VectorAttachment
from safegene_trl.models.inputs import Sample, SoftTargets, batches, padding_id, shortened, tokenize
from safegene_trl.models.losses import response_logits
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.recalibration.search import Recalibration, recalibrate
from safegene_trl.recalibration.touch_up import TouchUp, train_touch_up
from safegene_trl.step.repair import with_touch_up as with_deltas
from safegene_trl.step.shipped_weights import beside_weights

from .bank import Rows
from .transported import CARRIED


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
        soft: Kinds that have soft targets, the others have words alone.
        other: How many of the harmful ones are of other sources.
        own: Whether benign prompts that the aligned model answers are held to what the fine-tune
            itself finds likely there, and only the other shots to what the aligned model does.
        held: Whether what the fine-tune says in the rest of the benign answers, behind the first
            tokens, is held like the task's.
        screened: Whether the poison is left out of the task's shots, as a screening that makes no
            mistake would do.
        search: Settings of the search.
    """

    count: int = 32
    border: int = 0
    task: int = 32
    soft: Set[str] = frozenset({"harmful", "benign"})
    other: int = 0
    own: bool = False
    held: bool = False
    screened: bool = False
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
            found.append(own | ({"targets": row["targets"]} if kind in self.soft else {}))
        return found

    def shots(self, tuned: FineTune) -> CalibrationSet:
        lab = tuned.lab
        vector = replace(tuned.vector, prompts=self.rows(tuned.bank, tuned.seed))
        rows = read_jsonl(training_file(tuned.task, tuned.seed, lab.data, lab.family))
        if self.screened and tuned.task.name == "poisoned":
            plain = [conversation(row) for row in poisoned(lab.data)[-PLAIN:]]
            rows = [row for row in rows if conversation(row) in plain]
        context = lab.model.config.max_position_embeddings
        found = gather_shots(self.config(tuned.seed), vector, lab.tokenizer, context, rows).data
        found = _own(tuned, found) if self.own else found
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


def _own(tuned: FineTune, found: CalibrationSet) -> CalibrationSet:
    """With soft targets of the fine-tune in the place of the aligned model's benign answers."""
    assert found.benign is not None
    pad_id, lab = padding_id(tuned.lab.tokenizer), tuned.lab
    cut = [shortened(sample, None, REFUSAL_TOKENS) for sample in found.benign.samples]
    samples = [sample for sample in cut if sample]
    with lab.updated(tuned.update) as model, torch.no_grad():
        targets = []
        for sample in samples:
            (batch,) = batches([sample], 1, pad_id, lab.device)
            top = response_logits(model, batch)[0].float().log_softmax(-1).topk(LIKELIEST)
            targets.append(SoftTargets(sample.response, top.indices.tolist(), top.values.tolist()))
    own = [replace(s, soft=soft) for s, soft in zip(samples, targets, strict=True)]
    cut_at = len(found.benign.fit)
    return replace(found, benign=Split(own[:cut_at], own[cut_at:]))


def recalibrated(tuned: FineTune, drawn: Drawn) -> Made:
    """The fine-tune with the vector, its coefficients found on the shots."""
    return _made(tuned, drawn, with_vector=True, with_touch_up=False)


def touched_up(tuned: FineTune, drawn: Drawn, with_vector: bool = True) -> Made:
    """The step's touch-up on the same objective, after the vector or in its place."""
    return _made(tuned, drawn, with_vector, with_touch_up=True)


def _made(tuned: FineTune, drawn: Drawn, with_vector: bool, with_touch_up: bool) -> Made:
    lab, config, data = tuned.lab, drawn.config(tuned.seed), drawn.shots(tuned)
    vector, pad_id, sharding = tuned.vector, padding_id(lab.tokenizer), Sharding(lab.device)
    space = vector.space(config.search.granularity)
    about: dict[str, Any] = {}
    with lab.updated(tuned.update) as model:
        attachment = VectorAttachment(model, vector.deltas, space, sharding)
        began = time.perf_counter()
        if with_vector:
            found = recalibrate(attachment, data, config, pad_id)
            about = _about(found, time.perf_counter() - began, config)
        else:
            short = replace(config, search=replace(config.search, max_evaluations=1))
            found = recalibrate(attachment, data, short, pad_id)  # for its losses before
            found = replace(found, coefficients=dict.fromkeys(space.names, 0.0))
        added = ScaledVector(vector.deltas, space.by_module(found.coefficients))
        if with_touch_up:
            began = time.perf_counter()
            ship = partial(_beside, model, added, sharding)
            learned = train_touch_up(attachment, data, config, pad_id, found, ship)
            about |= _about_touch_up(learned, time.perf_counter() - began)
            if learned.accepted:
                added = with_deltas(added, learned.deltas)
    return _sum(tuned.update, _dense(added, lab.device)), about


def _beside(
    model: nn.Module, added: ScaledVector, sharding: Sharding, more: Mapping[str, LowRankDelta]
) -> AbstractContextManager[None]:
    return beside_weights(model, with_deltas(added, more), sharding)


def _dense(added: ScaledVector, device: torch.device) -> Update:
    """What is added to each module's weight, float32."""
    pairs = {name: added.factors(name) for name in added.deltas}
    return {name: b.to(device) @ a.to(device) for name, (a, b) in pairs.items()}


def _about(found: Recalibration, seconds: float, config: SafeGeneConfig) -> dict[str, Any]:
    own, top = np.array(list(found.coefficients.values())), config.search.max_coefficient
    return {
        "seconds_found": round(seconds, 1),
        "objective": [round(float(entry["objective"]), 4) for entry in found.history],
        "held_out_before": found.held_out_before.to_dict(),
        "held_out_after": found.held_out_after.to_dict(),
        "at_zero": round(float((own <= 1e-6).mean()), 3),
        "at_bound": round(float((own >= top - 1e-6).mean()), 3),
        "mean_coefficient": round(float(own.mean()), 3),
    }


def _about_touch_up(learned: TouchUp, seconds: float) -> dict[str, Any]:
    return {
        "touch_up": learned.reason,
        "touch_up_accepted": learned.accepted,
        "held_out_by_step": [[step, round(value, 4)] for step, value in learned.held_out_by_step],
        "seconds_touched_up": round(seconds, 1),
    }


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
    deltas = tuned.vector.deltas
    added = ScaledVector(deltas, dict.fromkeys(deltas, value))
    return _sum(tuned.update, _dense(added, tuned.lab.device)), {}


def _sum(one: Update, other: Update) -> Update:
    return {
        name: sum(each[name] for each in (one, other) if name in each)  # type: ignore[misc]
        for name in one.keys() | other.keys()
    }


def carried(tuned: FineTune, make: Callable[[Lab], SafetyVector]) -> Made:
    """A vector from another family, its coefficients found on the same shots."""
    return recalibrated(replace(tuned, vector=make(tuned.lab)), FEW)


WORDS: Set[str] = frozenset()
FEW, MANY = Drawn(border=16), Drawn(128, 64, 64)


def _on(drawn: Drawn, suffix: str) -> dict[str, Callable[[FineTune], Made]]:
    """What is compared on the same shots. The suffix of the names says how many there are."""

    def searched(**search: Any) -> Callable[[FineTune], Made]:
        return lambda tuned: recalibrated(tuned, replace(drawn, search=search))

    words = replace(drawn, soft=WORDS)
    mixed = replace(drawn, soft=frozenset({"benign"}))
    sources = replace(drawn, other=drawn.count // 2)
    variants: dict[str, Callable[[FineTune], Made]] = {
        "KL, border": searched(),
        "touch-up": lambda tuned: touched_up(tuned, drawn),
        "few-shot LoRA, tuned": lambda tuned: few_shot(tuned, words, searched=True),
        "KL LoRA": lambda tuned: touched_up(tuned, drawn, with_vector=False),
        "CE, border": lambda tuned: recalibrated(tuned, words),
        "KL, border, refusals as words": lambda tuned: recalibrated(tuned, mixed),
        "KL, border, own": lambda tuned: recalibrated(tuned, replace(drawn, own=True)),
        "KL, border, held": lambda tuned: recalibrated(tuned, replace(drawn, held=True)),
        "KL, border, screened": lambda tuned: recalibrated(tuned, replace(drawn, screened=True)),
        "KL, border, sources": lambda tuned: recalibrated(tuned, sources),
        "touch-up, held, sources": lambda tuned: touched_up(tuned, replace(sources, held=True)),
        "KL, border, utility 0.25": searched(utility_weight=0.25),
        "KL, border, T = 1": searched(utility_temperature=1.0),
        "KL, border, by rank": searched(granularity="rank"),
        "KL, border, 20 passes": searched(max_evaluations=20),
        "KL, border, bound 4": searched(max_coefficient=4.0),
    }
    return {f"{name}{suffix}": made for name, made in variants.items()}


VARIANTS: dict[str, Callable[[FineTune], Made]] = {
    "fine-tuned": lambda tuned: (tuned.update, {}),
    "CE": lambda tuned: recalibrated(tuned, Drawn(soft=WORDS)),
    "KL": lambda tuned: recalibrated(tuned, Drawn()),
    "few-shot LoRA": lambda tuned: few_shot(tuned, Drawn(soft=WORDS), searched=False),
    "uniform 1": lambda tuned: uniform(tuned, 1.0),
    **{name: partial(carried, make=make) for name, make in CARRIED.items()},
    **_on(FEW, ""),
    **_on(MANY, ", 128"),
}
