"""A component learned as a few-shot LoRA learns: refusals put back into a degraded model, its other
answers held.

    min_{A,B}  CE(refusals) + 4 · KL(p_degraded ‖ p on benign answers) + 2 · KL(p_degraded ‖ p on instructions)

The first two terms read the first eight tokens, where a model decides whether it refuses. The
degraded model is a fine-tune on general instructions, so that what is learned leaves alone how
instructions are answered; a difference of two models does not.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.baselines.few_shot import adapter_factors
from safegene_trl.checkpoints.loading import load_model, load_tokenizer
from safegene_trl.data.rows import conversation
from safegene_trl.extraction.aligned_rows import REFUSAL_TOKENS
from safegene_trl.judges import Exchange, judged
from safegene_trl.judges.refusal_phrases import RefusalPhrases
from safegene_trl.models.inputs import Sample, batches, padding_id, shortened, tokenize
from safegene_trl.models.losses import cross_entropy, divergence, response_logits
from safegene_trl.models.low_rank import LowRankDelta

from .families import MODELS, SMOLLM2, Family, device
from .tasks import Row, instructions_file, read_jsonl, sft


STEPS, RATE, RANK, LENGTH = 60, 5e-4, 8, 160


def repair(data: Path | None, family: Family = SMOLLM2) -> dict[str, LowRankDelta]:
    """The learned component, by module, on the CPU."""
    file = instructions_file(data)
    folder = family.work / "degraded" / "instructions"
    degraded = sft(folder, file, family, per_device_train_batch_size=8)
    tokenizer = load_tokenizer(family.aligned)
    adapted: Any = load_model(str(degraded), dtype=family.dtype)
    model = adapted.merge_and_unload().to(device())

    def samples(rows: Sequence[Row], response_tokens: int) -> list[Sample]:
        whole = [tokenize(tokenizer, *conversation(row)) for row in rows]  # type: ignore[arg-type]
        found = [shortened(sample, LENGTH, response_tokens) for sample in whole]
        return [sample for sample in found if sample]

    rows = read_jsonl(MODELS / "align.jsonl")
    exchanges = [
        Exchange(row["prompt"][0]["content"], row["completion"][0]["content"], ()) for row in rows
    ]
    refused = [verdict.label == "refused" for verdict in judged(RefusalPhrases(), exchanges)]
    starts = [
        samples(
            [row for row, is_refusal in zip(rows, refused, strict=True) if is_refusal == kind],
            REFUSAL_TOKENS,
        )
        for kind in (True, False)
    ]
    return _train(model, padding_id(tokenizer), *starts, samples(read_jsonl(file)[:400], LENGTH))


def _train(
    model: nn.Module,
    pad_id: int,
    refusals: list[Sample],
    benign: list[Sample],
    instructions: list[Sample],
) -> dict[str, LowRankDelta]:
    draw, place = random.Random(0), next(model.parameters()).device
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW(
        [p for p in tuned.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 5) * (1 - step / STEPS)
        (batch,) = batches(draw.sample(refusals, 5), 5, pad_id, place)
        (cross_entropy(tuned, batch).sum() / batch.target_mask.sum()).backward()
        for group, size, weight in ((benign, 10, 4.0), (instructions, 4, 2.0)):
            (batch,) = batches(draw.sample(group, size), size, pad_id, place)
            with torch.no_grad(), tuned.disable_adapter():
                held = response_logits(tuned, batch)[0].log_softmax(dim=-1)
            (weight * divergence(tuned, batch, held).sum() / batch.target_mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: LowRankDelta(factors.a.cpu(), factors.b.cpu())
        for name, factors in adapter_factors(tuned).items()
    }
