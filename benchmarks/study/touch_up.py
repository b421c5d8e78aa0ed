"""A low-rank touch-up: a LoRA trained on the recalibration's own objective, from where the weights
are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import Update
from benchmarks.baselines.few_shot import adapter_updates, new_lora
from benchmarks.paper_table.lab import Lab
from safegene_trl.data.calibration import CalibrationSet, Split
from safegene_trl.errors import SafeGeneError
from safegene_trl.models.inputs import Sample, collate, padding_id
from safegene_trl.models.losses import sample_losses, stored_reference


RANK, PER_TERM, CHECKS = 8, 8, 6
TEMPERATURE = 2.0
TERMS = ("utility", "safety", "benign")
Chosen = Mapping[str, Sequence[Sample]]


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW, and the learning rate, which falls to 0."""

    steps: int = 48
    learning_rate: float = 3e-4


def touch_up(
    lab: Lab,
    fine_tuned: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
    shots: CalibrationSet,
    schedule: Schedule,
    seed: int,
) -> tuple[Update, dict[str, Any]]:
    """What a LoRA adds to the aligned model plus `start`, at the step where the held-out shots have the
    objective lowest; nothing where no step is lower than the start.

    Args:
        lab: Holds the aligned model.
        fine_tuned: The update that the task's samples are held against.
        start: The update to begin at.
        shots: Of which those to fit on are trained on.
        schedule: How long, and at which rate.
        seed: Of the LoRA's first weights and of the batches.

    Raises:
        SafeGeneError: The training diverged.
    """
    with lab.updated(fine_tuned) as model:
        terms = _Terms(lab, model, shots)
    generator = torch.Generator().manual_seed(seed)
    best: Update = {}
    with lab.updated(start) as model, new_lora(model, RANK, seed) as tuned:
        path = [(0, terms.held_out(tuned))]
        weights = [p for p in tuned.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=schedule.learning_rate, weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, schedule.steps)
        for step in range(1, schedule.steps + 1):
            terms.of(tuned, terms.drawn(generator)).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            falling.step()
            optimizer.zero_grad()
            if step % max(schedule.steps // CHECKS, 1):
                continue
            path.append((step, terms.held_out(tuned)))
            if path[-1][1] == min(value for _, value in path):
                best = {name: matrix.clone() for name, matrix in adapter_updates(tuned).items()}
    return best, {"held_out_by_step": [[step, round(value, 4)] for step, value in path]}


class _Terms:
    """The recalibration's objective on a calibration set; `model` is the fine-tuned one."""

    def __init__(self, lab: Lab, model: nn.Module, shots: CalibrationSet):
        splits = {"utility": shots.task, "safety": shots.harmful, "benign": shots.all_benign}
        self._splits: dict[str, Split] = {term: own for term, own in splits.items() if own}
        self._pad, self._device = padding_id(lab.tokenizer), lab.device
        with torch.no_grad():
            self._known = {
                id(sample): stored_reference(model, collate([sample], self._pad, lab.device), 1)
                for sample in (*shots.task.fit, *shots.task.held_out)
            }

    def drawn(self, generator: torch.Generator) -> Chosen:
        """A few samples of every term, to fit on."""
        found = {}
        for term, split in self._splits.items():
            order = torch.randperm(len(split.fit), generator=generator)[:PER_TERM]
            found[term] = [split.fit[index] for index in order.tolist()]
        return found

    def of(self, model: nn.Module, chosen: Chosen) -> torch.Tensor:
        """The sum of the terms, each the mean over its samples' response tokens, in nats."""
        return torch.stack(
            [sums / _tokens(chosen[term]) for term, sums in self._sums(model, chosen).items()]
        ).sum()

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """The same of all held-out samples.

        Raises:
            SafeGeneError: It is no number.
        """
        held = {term: split.held_out for term, split in self._splits.items()}
        sums = dict.fromkeys(held, 0.0)
        for begin in range(0, max(map(len, held.values())), PER_TERM):
            chosen = {term: own[begin : begin + PER_TERM] for term, own in held.items()}
            for term, part in self._sums(model, chosen).items():
                sums[term] += float(part)
        found = sum(sums[term] / _tokens(own) for term, own in held.items())
        if not math.isfinite(found):
            raise SafeGeneError("The touch-up has diverged: give it a lower learning rate.")
        return found

    def _sums(self, model: nn.Module, chosen: Chosen) -> dict[str, torch.Tensor]:
        """Summed losses of every term that has samples, in one pass."""
        present = [term for term in TERMS if chosen.get(term)]
        batch = collate([s for term in present for s in chosen[term]], self._pad, self._device)
        compared = [self._known[id(sample)] for sample in chosen.get("utility", ())]
        reference = torch.cat(compared) if compared else None
        losses = sample_losses(model, batch, reference, TEMPERATURE)
        parts = losses.split([len(chosen[term]) for term in present])
        return {term: part.sum() for term, part in zip(present, parts, strict=True)}


def _tokens(samples: Sequence[Sample]) -> int:
    return max(sum(sum(sample.is_response[1:]) for sample in samples), 1)
