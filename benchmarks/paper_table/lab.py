"""The aligned model in memory, what every method may read of it, and the measurements on an updated
model.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import Update, norm
from benchmarks.baselines.few_shot import adapter_factors, adapter_updates
from benchmarks.baselines.moments import input_moments
from safegene_trl import DataConfig, SafeGeneConfig, SafetyVector
from safegene_trl.checkpoints.completeness import load_adapter
from safegene_trl.checkpoints.loading import load_model, load_tokenizer
from safegene_trl.data.prompts import Prompt, kept_apart, load_prompts, prompts_used, spread
from safegene_trl.data.rows import conversation
from safegene_trl.data.shots import Shots, gather_shots
from safegene_trl.data.sources import draw
from safegene_trl.errors import SafeGeneError
from safegene_trl.judges import Exchange, judged
from safegene_trl.judges.refusal_phrases import RefusalPhrases
from safegene_trl.models.generation import Messages, generate_answers
from safegene_trl.models.inputs import Sample, batches, padding_id, tokenize
from safegene_trl.models.losses import response_logits
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.vectors.prompt_rows import rows_of

from .families import MODELS, SMOLLM2, Family, device
from .tasks import Task, prompt_source, read_jsonl, splits, training_file, write_jsonl
from .vectors import vector


LETTERS = {"refused": "r", "answered": "a", "off_task": "o", "incoherent": "i", "unjudged": "u"}
SETS = {  # column: file of prompts, their kind, how many
    "BT": ("harmful/beavertails_eval_dev.jsonl", "harmful", 70),
    "DR": ("harmful/harmbench_val.jsonl", "harmful", 41),
    "look-alikes": ("benign/oktest.jsonl", "benign", 40),
    "contrast": ("benign/coconot_contrast.jsonl", "benign", 40),
}
NEW_TOKENS = {"prompts": 32, "labels": 4}
BATCHES = {"prompts": 35, "labels": 40}  # on a CPU
BATCH_ON_ACCELERATOR = 256
SHOTS = {"num_safety_shots": 32, "num_task_shots": 32, "num_benign_shots": 32}


class Lab:
    """Holds the aligned model, puts updates on it and measures: on the accelerator in bfloat16
    where there is one, else in float32.

    Args:
        data: Folder with the data sets; None takes them from the hub.
        test_rows: Test samples of a classifier's task.
        free_rows: Test samples of a task with free answers, each of many tokens.
        scale: Share (0–1] of the prompts of every set; below 1 only to see that it runs.
        family: Whose aligned model it is.
        sets: Prompts to measure on, as `SETS` names them.

    Raises:
        SafeGeneError: The model or prepared data are not there.
    """

    def __init__(
        self,
        data: Path | None,
        test_rows: int = 200,
        free_rows: int = 60,
        scale: float = 1.0,
        family: Family = SMOLLM2,
        sets: Mapping[str, tuple[str, str, int]] = SETS,
    ):
        self.data, self.test_rows, self.free_rows, self.scale = data, test_rows, free_rows, scale
        self.family, self.device, self.sets = family, device(), sets
        self.used = [
            MODELS / f"{name}.jsonl" for name in ("align", "safety_prompts", "benign_prompts")
        ]
        if not all(path.is_file() for path in self.used):
            raise SafeGeneError(
                f"{MODELS} holds no prepared data: run `python recipes/smollm2-135m/prepare.py` first, "
                "for another family with --data-only."
            )
        model: Any = load_model(family.aligned, dtype=family.dtype)
        self.model = model.requires_grad_(False).to(self.device)
        if family.attention:
            self.model.set_attn_implementation(family.attention)
        self.tokenizer = load_tokenizer(family.aligned)

    @cached_property
    def linear_modules(self) -> list[str]:
        """Names of all modules that fine-tunes change."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        ]

    @cached_property
    def alignment(self) -> Update:
        """`V` of SafeLoRA: aligned minus released weights.

        Raises:
            SafeGeneError: The family's model before its alignment was not named.
        """
        if self.family.base is None:
            raise SafeGeneError(
                "This method reads the model before its alignment: name it with --base."
            )
        released: Any = load_model(self.family.base, dtype="float32")
        return {
            name: self.weight(name) - released.get_submodule(name).weight.detach().to(self.device)
            for name in self.linear_modules
        }

    def weight(self, name: str) -> torch.Tensor:
        """A module's weights as they are now, float32."""
        return self.model.get_submodule(name).weight.detach().float()

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The prompts of every column, without those that repeat one that model or vector were made
        with.
        """
        used = prompts_used(map(str, self.used))
        found = {}
        for column, (file, kind, count) in self.sets.items():
            prompts = load_prompts(prompt_source(file, self.data), kind, "train", None, 0)  # type: ignore[arg-type]
            if column == "contrast":
                prompts = [p for p in prompts if p.category == "Requests with safety concerns"]
            found[column] = spread(
                kept_apart(prompts, used)[0], max(2, round(count * self.scale)), seed=0
            )
        return found

    def shots(self, task: Task, seed: int) -> Shots:
        """The shots that `safegene apply` draws in the same setting."""
        rows = read_jsonl(training_file(task, seed, self.data, self.family))
        config = SafeGeneConfig(vector=str(self.vector), data=DataConfig(**SHOTS), seed=seed)
        context = self.model.config.max_position_embeddings
        return gather_shots(
            config, SafetyVector.from_pretrained(self.vector), self.tokenizer, context, rows
        )

    @property
    def vector(self) -> Path:
        """Folder of the family's vector."""
        return vector("three components", self.data, self.family)

    def refusals(self) -> list[Sample]:
        """All harmful prompts that come with the vectors, with the aligned model's refusals."""
        rows = SafetyVector.from_pretrained(self.vector).prompts
        return [
            tokenize(self.tokenizer, [{"role": "user", "content": row["prompt"]}], row["response"])
            for row in rows_of(rows, "harmful")
        ]

    def moments(self, samples: Sequence[Sample], responses_only: bool) -> dict[str, torch.Tensor]:
        """Second moments of the inputs of all modules that fine-tunes change."""
        pad = padding_id(self.tokenizer)
        return input_moments(self.model, self.linear_modules, samples, pad, responses_only)

    @contextmanager
    def updated(self, update: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
        """The model with `ΔW` (float32, on any device) added and rounded once to the model's own
        type; bit for bit as it was afterwards.
        """
        before = {}
        try:
            with torch.no_grad():
                for name, matrix in update.items():
                    weight = self.model.get_submodule(name).weight
                    before[name] = weight.detach().clone()
                    weight.copy_(weight.float() + matrix.to(weight.device))
            yield self.model
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    self.model.get_submodule(name).weight.copy_(weight)

    def measure(
        self, update: Mapping[str, torch.Tensor], task: Task, answers_to: Path
    ) -> dict[str, Any]:
        """Labels of the answers to all prompts, and the task's utility, of the aligned model plus
        an update.

        Returns:
            `labels`: a string per column with one letter per prompt (`LETTERS`); `utility`: per
                test sample the share (0–1) of what is
            right; `seconds`. The answers go to a file, for other judges.
        """
        started = time.perf_counter()
        judge, labels, kept = RefusalPhrases(), {}, []
        with self.updated(update) as model:
            for column, prompts in self.prompts.items():
                messages = [list(prompt.messages) for prompt in prompts]
                answers = self.answers(messages, NEW_TOKENS["prompts"], self._batch("prompts"))
                verdicts = judged(
                    judge,
                    [
                        Exchange(p.text, a, task.labels)
                        for p, a in zip(prompts, answers, strict=True)
                    ],
                )
                labels[column] = "".join(LETTERS[verdict.label] for verdict in verdicts)
                kept += [
                    asdict(prompt) | {"answer": answer}
                    for prompt, answer in zip(prompts, answers, strict=True)
                ]
            utility = self.utility(model, task)
        write_jsonl(kept, answers_to)
        return {"labels": labels, "utility": utility, "seconds": time.perf_counter() - started}

    def answers(self, messages: Sequence[Messages], new_tokens: int, size: int) -> list[str]:
        """What the model as it is now says, greedily, so many conversations at a time. On a CPU in
        float32, of the same weights: one token a row is a third as fast there in bfloat16.
        """
        rounded = [p for p in self.model.parameters() if p.dtype == torch.bfloat16]
        rounded = rounded if self.device.type == "cpu" else []
        try:
            for parameter in rounded:
                parameter.data = parameter.data.float()
            return generate_answers(self.model, self.tokenizer, messages, new_tokens, size)
        finally:
            for parameter in rounded:
                parameter.data = parameter.data.bfloat16()

    def utility(self, model: nn.Module, task: Task) -> list[float]:
        """Per test sample the share (0–1) of what is right: a label, or of the tokens of a free
        answer.
        """
        rows = draw(splits(task, self.data)[1], max(4, round(self.test_rows * self.scale)), seed=0)
        if task.labels:
            messages = [conversation(row)[0] for row in rows]
            answers = self.answers(messages, NEW_TOKENS["labels"], self._batch("labels"))
            return [
                float(answer.lower().strip(" .!\"'").startswith(row["label"]))
                for row, answer in zip(rows, answers, strict=True)
            ]
        rows = rows[: self.free_rows]
        # type: ignore[arg-type]
        return self._token_accuracy(
            model, [tokenize(self.tokenizer, *conversation(row)) for row in rows]
        )

    def _batch(self, kind: str) -> int:
        """Prompts that are answered at a time."""
        return BATCHES[kind] if self.device.type == "cpu" else BATCH_ON_ACCELERATOR

    @torch.no_grad()
    def _token_accuracy(self, model: nn.Module, samples: Sequence[Sample]) -> list[float]:
        """Per sample the share of response tokens that the model finds most likely, given what goes
        before.
        """
        found, longest = [], self.family.max_length
        for sample in samples:
            cut = Sample(sample.input_ids[:longest], sample.is_response[:longest])
            if not any(cut.is_response[1:]):
                continue
            (batch,) = batches([cut], 1, padding_id(self.tokenizer), self.device)
            logits, targets = response_logits(model, batch)
            found.append(round(float((logits.argmax(dim=-1) == targets).float().mean()), 4))
        return found

    def update_of(self, adapter: Path) -> Update:
        """`ΔW` (float32) of a saved adapter on the aligned model.

        Raises:
            SafeGeneError: It is incomplete, or holds what is no number.
        """
        with self._adapted(adapter) as model:
            update = adapter_updates(model)
        if not all(bool(matrix.isfinite().all()) for matrix in update.values()):
            raise SafeGeneError(
                f"{adapter} holds weights that are no numbers: its training diverged. Train it again "
                "at a lower rate, or in float32."
            )
        return update

    def factors_of(self, adapter: Path) -> dict[str, LowRankDelta]:
        """The same as factors, on the CPU like a vector's."""
        with self._adapted(adapter) as model:
            return {
                name: LowRankDelta(factors.a.cpu(), factors.b.cpu())
                for name, factors in adapter_factors(model).items()
            }

    @contextmanager
    def _adapted(self, adapter: Path) -> Iterator[nn.Module]:
        tuned = load_adapter(self.model, str(adapter))
        try:
            yield tuned
        finally:
            tuned.unload()  # PEFT has put its layers into the model itself


def change(before: Update, after: Update) -> dict[str, Any]:
    """How much of a fine-tune's update a method keeps: `‖ΔW'‖/‖ΔW‖` per module and what it comes
    to.

    `mark` is `changes nothing` where `‖ΔW' − ΔW‖ < 0.001 ‖ΔW‖`, and `deletes the update` where most
    modules keep less than 5 % of it.
    """
    after = {name: after.get(name, torch.zeros_like(matrix)) for name, matrix in before.items()}
    ratios = {
        name: float(after[name].norm() / matrix.norm())
        for name, matrix in before.items()
        if matrix.norm() > 0
    }
    difference = {name: after[name] - matrix for name, matrix in before.items()}
    moved = norm(difference) / norm(before)
    deleted = sum(ratio < 0.05 for ratio in ratios.values()) > len(ratios) / 2
    mark = "changes nothing" if moved < 1e-3 else "deletes the update" if deleted else None
    return {
        "norm_ratio": norm(after) / norm(before),
        "moved": moved,
        "mark": mark,
        "modules": {name: round(ratio, 4) for name, ratio in ratios.items()},
    }
