"""The plain alternative: a few steps of LoRA fine-tuning on the very shots that recalibration gets."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from safegene_trl.data.calibration import CalibrationSet
from safegene_trl.models.inputs import Sample, batches
from safegene_trl.models.losses import cross_entropy
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.parameters import canonical_modules, task_factors

from . import Update


RANK = 8
BATCH_SIZE = 8


def few_shot_update(
    model: nn.Module,
    shots: CalibrationSet,
    pad_id: int,
    rank: int = RANK,
    steps: int = 30,
    learning_rate: float = 5e-4,
    seed: int = 0,
) -> Update:
    """What a new LoRA on all linear layers adds to `model` when trained on all shots: refusals,
    benign answers, task samples.

    The model has its own layers and weights afterwards, frozen.

    AdamW, constant rate, mean cross-entropy per response token; every batch is drawn anew from all
    the shots.
    """
    samples: list[Sample] = []
    for split in (shots.harmful, shots.task, shots.benign):
        if split is not None:
            samples += split.samples
    with new_lora(model, rank, seed) as tuned:
        for _ in training(tuned, samples, pad_id, steps, learning_rate):
            pass
        return adapter_updates(tuned)


@contextmanager
def new_lora(model: nn.Module, rank: int, seed: int) -> Iterator[Any]:
    """The model with a new LoRA of scale 2 on all its linear layers; as it was afterwards, frozen.

    Random numbers that are drawn meanwhile follow from the seed, and others are left alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        tuned = get_peft_model(model, config).train()
        try:
            yield tuned
        finally:
            tuned.eval()
            tuned.unload()  # PEFT has put its layers into the model itself


def training(
    tuned: nn.Module, samples: Sequence[Sample], pad_id: int, steps: int, learning_rate: float
) -> Iterator[float]:
    """Trains a LoRA; after every step the loss (nats per token) that its batch had before it."""
    optimizer = torch.optim.AdamW(
        [p for p in tuned.parameters() if p.requires_grad], lr=learning_rate
    )
    device = next(tuned.parameters()).device
    for _ in range(steps):
        chosen = [samples[i] for i in torch.randperm(len(samples))[:BATCH_SIZE].tolist()]
        (batch,) = batches(chosen, BATCH_SIZE, pad_id, device)
        loss = cross_entropy(tuned, batch).sum() / batch.target_mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


@torch.no_grad()
def adapter_updates(model: nn.Module) -> Update:
    """`ΔW` of every module that a PEFT model's LoRA adapts, by the module's own name."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(
            module.active_adapters[0]
        ).float()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def adapter_factors(model: nn.Module) -> dict[str, LowRankDelta]:
    """The same as factors, the scaling in `B`."""
    return {
        name: LowRankDelta(factors.a.detach(), factors.b.detach() * factors.scaling)
        for name, module in canonical_modules(model).items()
        for factors in task_factors(module)
    }
