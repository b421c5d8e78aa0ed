"""The plain alternative: a few steps of LoRA fine-tuning on the very shots that recalibration gets."""

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


def few_shot_update(
    model: nn.Module,
    shots: CalibrationSet,
    pad_id: int,
    rank: int = 8,
    steps: int = 30,
    learning_rate: float = 5e-4,
    batch_size: int = 8,
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
            samples += [*split.fit, *split.held_out]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        tuned = get_peft_model(model, config).train()
        optimizer = torch.optim.AdamW(
            [p for p in tuned.parameters() if p.requires_grad], lr=learning_rate
        )
        for _ in range(steps):
            chosen = [samples[i] for i in torch.randperm(len(samples))[:batch_size].tolist()]
            (batch,) = batches(chosen, batch_size, pad_id, next(model.parameters()).device)
            loss = cross_entropy(tuned, batch).sum() / batch.target_mask.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    update = adapter_updates(tuned.eval())
    tuned.unload()  # PEFT has put its layers into the model itself
    return update


def adapter_updates(model: nn.Module) -> Update:
    """`ΔW` of every module that a PEFT model's LoRA adapts, by the module's own name."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(module.active_adapters[0])
        .detach()
        .float()
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
