"""`distill`: low-rank factors learned so that the degraded model answers harmful prompts as the aligned one does.

SafeGene (arXiv 2606.06519) distils the discrepancy between the two models. Here the student is the degraded model with the
vector on it, started from `delta`:

    min_{A,B}  mean_{harmful} KL(p_aligned ‖ p_student) + α · mean_{benign} KL(p_degraded ‖ p_student)

over the response tokens of the aligned model's own answers. The second term is an anchor: on benign prompts the vector is to
change nothing, so that it learns to move refusals alone. Both references are computed once, so that the student is the only
model in memory while it is trained.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from ..attach import LowRankDelta
from ..calibration import Batch, Sample, batches
from ..recalibration import response_logits
from ..weights import base_model, canonical_modules, task_factors


@dataclass(frozen=True)
class ReferenceBatch:
    """A batch with the log-probabilities that the student is to have on its response tokens.

    Attributes:
        batch: The tokens.
        log_probs: tokens×vocabulary, float16, on the CPU.
        is_anchor: Whether the prompts are benign and the log-probabilities the degraded model's own.
    """

    batch: Batch
    log_probs: torch.Tensor
    is_anchor: bool


@torch.no_grad()
def reference_batches(
    model: nn.Module, samples: Sequence[Sample], batch_size: int, pad_id: int, is_anchor: bool
) -> list[ReferenceBatch]:
    """Samples with a model's own log-probabilities."""
    model.eval()
    found = []
    for batch in batches(samples, batch_size, pad_id, base_model(model).device):
        log_probs = F.log_softmax(response_logits(model, batch)[0], dim=-1)
        found.append(ReferenceBatch(batch, log_probs.to("cpu", torch.float16), is_anchor))
    return found


def divergence(model: nn.Module, item: ReferenceBatch) -> torch.Tensor:
    """Mean `KL(reference ‖ model)` over the response tokens of a batch, in nats."""
    log_probs = F.log_softmax(response_logits(model, item.batch)[0], dim=-1)
    reference = item.log_probs.to(log_probs.device, torch.float32)
    return F.kl_div(log_probs, reference, reduction="batchmean", log_target=True)


def distilled(
    degraded: Any,
    deltas: Mapping[str, LowRankDelta],
    data: Sequence[ReferenceBatch],
    anchor_weight: float,
    steps: int,
    learning_rate: float,
    seed: int,
    show_progress: bool = True,
) -> tuple[dict[str, LowRankDelta], dict[str, dict[str, float]]]:
    """Trains the factors.

    Args:
        degraded: The degraded model, plain or with its LoRA; it is used up.
        deltas: Where the factors start, by canonical module name.
        data: Batches with their references.
        anchor_weight: α.
        steps: Optimiser steps, one batch each.
        learning_rate: Of AdamW, with a cosine schedule.
        seed: Of the batches' order.
        show_progress: Whether to show a progress bar.

    Returns:
        The trained deltas (float32), and the mean divergences `harmful` and `benign` before and after, in nats per token.
    """
    plain = degraded.merge_and_unload() if isinstance(degraded, PeftModel) else degraded
    student = _with_factors(plain, deltas)
    losses = {"before": _losses(student, data)}
    with tempfile.TemporaryDirectory() as folder:
        _DistillationTrainer(
            anchor_weight,
            model=student,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=1,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                weight_decay=0.0,
                use_cpu=not torch.cuda.is_available(),
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                logging_strategy="no",
                disable_tqdm=not show_progress,
                seed=seed,
            ),
            train_dataset=list(data),
            data_collator=lambda items: {"item": items[0]},
        ).train()
    losses["after"] = _losses(student, data)
    modules = canonical_modules(student)
    trained = {name: task_factors(modules[name])[0].pair() for name in deltas}
    return {name: LowRankDelta(a.cpu().clone(), b.cpu().clone()) for name, (a, b) in trained.items()}, losses


class _DistillationTrainer(Trainer):
    def __init__(self, anchor_weight: float, **kwargs: Any):
        super().__init__(**kwargs)
        self._anchor_weight = anchor_weight

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        item: ReferenceBatch = inputs["item"]
        model.eval()  # dropout would move the student away from references made without it
        return divergence(model, item) * (self._anchor_weight if item.is_anchor else 1.0)


@torch.no_grad()
def _losses(model: nn.Module, data: Sequence[ReferenceBatch]) -> dict[str, float]:
    model.eval()
    found: dict[str, float] = {}
    for name, is_anchor in (("harmful", False), ("benign", True)):
        items = [item for item in data if item.is_anchor == is_anchor]
        tokens = [len(item.log_probs) for item in items]
        total = sum(float(divergence(model, item)) * count for item, count in zip(items, tokens, strict=True))
        found[name] = total / max(1, sum(tokens))
    return found


def _with_factors(model: nn.Module, deltas: Mapping[str, LowRankDelta]) -> PeftModel:
    rank = next(iter(deltas.values())).a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(deltas), task_type="CAUSAL_LM")
    student: Any = get_peft_model(model, config)
    modules = canonical_modules(student)
    with torch.no_grad():
        for name, delta in deltas.items():
            (factors,) = task_factors(modules[name])
            factors.a.copy_(delta.a)
            factors.b.copy_(delta.b)
    return student
