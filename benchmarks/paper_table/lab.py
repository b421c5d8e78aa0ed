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
from safegene_trl.checkpoints.loading import load_model, load_tokenizer
from safegene_trl.data.prompts import Prompt, kept_apart, load_prompts, prompts_used, spread
from safegene_trl.data.rows import conversation
from safegene_trl.data.shots import Shots, gather_shots
from safegene_trl.data.sources import draw
from safegene_trl.judges import Exchange, judged
from safegene_trl.judges.refusal_phrases import RefusalPhrases
from safegene_trl.models.generation import generate_answers
from safegene_trl.models.inputs import Sample, batches, padding_id, tokenize
from safegene_trl.models.losses import response_logits
from safegene_trl.models.low_rank import LowRankDelta

from .tasks import MODELS, Task, prompt_source, read_jsonl, splits, training_file, write_jsonl
from .vectors import SHIPPED


LETTERS = {"refused": "r", "answered": "a", "off_task": "o", "incoherent": "i", "unjudged": "u"}
SETS = {  # column: file of prompts, their kind, how many
    "BT": ("harmful/beavertails_eval_dev.jsonl", "harmful", 70),
    "DR": ("harmful/harmbench_val.jsonl", "harmful", 41),
    "look-alikes": ("benign/oktest.jsonl", "benign", 40),
    "contrast": ("benign/coconot_contrast.jsonl", "benign", 40),
}
NEW_TOKENS = {"prompts": 32, "labels": 4}
SHOTS = {"num_safety_shots": 32, "num_task_shots": 32, "num_benign_shots": 32}


class Lab:
    """Holds the aligned model, puts updates on it and measures.

    Args:
        data: Folder with the data sets; None takes them from the hub.
        test_rows: Test samples of a classifier's task.
        free_rows: Test samples of a task with free answers, each of many tokens.
        scale: Share (0–1] of the prompts of every set; below 1 only to see that it runs.
    """

    def __init__(
        self, data: Path | None, test_rows: int = 200, free_rows: int = 60, scale: float = 1.0
    ):
        self.data, self.test_rows, self.free_rows, self.scale = data, test_rows, free_rows, scale
        self.model: Any = load_model(str(MODELS / "aligned"), dtype="float32").requires_grad_(False)
        self.tokenizer = load_tokenizer(str(MODELS / "aligned"))

    @cached_property
    def alignment(self) -> Update:
        """`V` of SafeLoRA: aligned minus released weights."""
        released: Any = load_model(str(MODELS / "released"), dtype="float32")
        names = [name for name, module in released.named_modules() if isinstance(module, nn.Linear)]
        return {
            name: self.model.get_submodule(name).weight.detach()
            - released.get_submodule(name).weight.detach()
            for name in names
            if name != "lm_head"
        }

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The prompts of every column, without those that repeat one that model or vector were made
        with.
        """
        used = prompts_used(
            str(MODELS / f"{name}.jsonl") for name in ("align", "safety_prompts", "benign_prompts")
        )
        found = {}
        for column, (file, kind, count) in SETS.items():
            prompts = load_prompts(prompt_source(file, self.data), kind, "train", None, 0)  # type: ignore[arg-type]
            if column == "contrast":
                prompts = [p for p in prompts if p.category == "Requests with safety concerns"]
            found[column] = spread(
                kept_apart(prompts, used)[0], max(2, round(count * self.scale)), seed=0
            )
        return found

    def shots(self, task: Task, seed: int) -> Shots:
        """The shots that `safegene apply` draws in the same setting."""
        rows = read_jsonl(training_file(task, seed, self.data))
        config = SafeGeneConfig(vector=str(SHIPPED), data=DataConfig(**SHOTS), seed=seed)
        context = self.model.config.max_position_embeddings
        return gather_shots(
            config, SafetyVector.from_pretrained(SHIPPED), self.tokenizer, context, rows
        )

    def refusals(self) -> list[Sample]:
        """All harmful prompts that come with the vectors, with the aligned model's refusals."""
        rows = SafetyVector.from_pretrained(SHIPPED).prompts
        return [
            tokenize(self.tokenizer, [{"role": "user", "content": row["prompt"]}], row["response"])
            for row in rows
            if row["kind"] == "harmful"
        ]

    def moments(self, samples: Sequence[Sample], responses_only: bool) -> dict[str, torch.Tensor]:
        """Second moments of the inputs of all modules that fine-tunes change."""
        pad = padding_id(self.tokenizer)
        return input_moments(self.model, list(self.alignment), samples, pad, responses_only)

    @contextmanager
    def updated(self, update: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
        """The model with `ΔW` added; as it was afterwards."""
        before = {}
        with torch.no_grad():
            for name, matrix in update.items():
                weight = self.model.get_submodule(name).weight
                before[name] = weight.detach().clone()
                weight += matrix
        try:
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
                answers = generate_answers(
                    model, self.tokenizer, messages, NEW_TOKENS["prompts"], 35
                )
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

    def utility(self, model: nn.Module, task: Task) -> list[float]:
        """Per test sample the share (0–1) of what is right: a label, or of the tokens of a free
        answer.
        """
        rows = draw(splits(task, self.data)[1], max(4, round(self.test_rows * self.scale)), seed=0)
        if task.labels:
            messages = [conversation(row)[0] for row in rows]
            answers = generate_answers(model, self.tokenizer, messages, NEW_TOKENS["labels"], 40)
            return [
                float(answer.lower().strip(" .!\"'").startswith(row["label"]))
                for row, answer in zip(rows, answers, strict=True)
            ]
        rows = rows[: self.free_rows]
        # type: ignore[arg-type]
        return self._token_accuracy(
            model, [tokenize(self.tokenizer, *conversation(row)) for row in rows]
        )

    @torch.no_grad()
    def _token_accuracy(self, model: nn.Module, samples: Sequence[Sample]) -> list[float]:
        """Per sample the share of response tokens that the model finds most likely, given what goes
        before.
        """
        found = []
        for sample in samples:
            cut = Sample(sample.input_ids[:256], sample.is_response[:256])
            if not any(cut.is_response[1:]):
                continue
            (batch,) = batches([cut], 1, padding_id(self.tokenizer), torch.device("cpu"))
            logits, targets = response_logits(model, batch)
            found.append(round(float((logits.argmax(dim=-1) == targets).float().mean()), 4))
        return found

    def update_of(self, adapter: Path) -> Update:
        """`ΔW` of a saved adapter on the aligned model."""
        return adapter_updates(load_model(str(adapter), dtype="float32"))

    def factors_of(self, adapter: Path) -> dict[str, LowRankDelta]:
        """The same as factors."""
        return adapter_factors(load_model(str(adapter), dtype="float32"))


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
