"""`distill`: low-rank factors learned so that the degraded model answers harmful prompts as the
aligned one does.

SafeGene (arXiv 2606.06519) distils the discrepancy between the two models. Here the student is the
degraded model with the vector on it, started from `delta`:

    min_{A,B}  mean_{harmful} KL(p_aligned ‖ p_student) + α · mean_{benign} KL(p_degraded ‖ p_student)

over the response tokens of the aligned model's own answers. The second term is an anchor: on benign
prompts the vector is to change nothing, so that it learns to move refusals alone. Both references
are computed once, so that the student is the only model in memory while it is trained. The training
is a `transformers.Trainer`'s, in as many processes as there are.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints.scratch import scratch_folder
from ..distributed.layouts import Sharding, is_whole, sharding_of
from ..errors import ConfigError, UnsupportedModelError
from ..models.experts import expert_weights
from ..models.inputs import Batch, Sample, batches
from ..models.losses import divergence, response_logits
from ..models.low_rank import LowRankDelta
from ..models.parameters import canonical_modules, own_names
from ..progress import may_show
from .linearization import Blocks, blocks_of, linearized


ADAPTER = "safety"
_ON_EXPERTS = (
    "PEFT puts a LoRA for linear layers beside the experts of this mixture on the experts, so that the vector cannot be trained: "
    "use `method: delta`."
)


@dataclass(frozen=True)
class ReferenceBatch:
    """A batch with the log-probabilities that the student is to have on its response tokens.

    Attributes:
        batch: The tokens.
        log_probs: tokens×vocabulary, float16, on the CPU.
        is_anchor: Whether the prompts are benign and the log-probabilities the degraded model's
            own.
    """

    batch: Batch
    log_probs: torch.Tensor
    is_anchor: bool


@dataclass(frozen=True)
class DistillationSettings:
    """How the factors are trained.

    Attributes:
        steps: Optimiser steps, one batch each in every process.
        learning_rate: Of AdamW, with a cosine schedule.
        anchor_weight: α.
        seed: Of the batches' order.
        dtype: The models' data type.
        linearized_blocks: Which blocks are replaced by their first-order expansion, see
            `linearization.py`.
    """

    steps: int
    learning_rate: float
    anchor_weight: float
    seed: int = 0
    dtype: torch.dtype = torch.float32
    linearized_blocks: Blocks | None = None


@torch.no_grad()
def reference_batches(
    model: nn.Module,
    samples: Sequence[Sample],
    batch_size: int,
    pad_id: int,
    is_anchor: bool,
    sharding: Sharding,
) -> list[ReferenceBatch]:
    """Samples with a model's own log-probabilities. Collective: each rank works on its share, all
    have the outcome.
    """
    model.eval()
    groups = batches(samples, batch_size, pad_id, sharding.device)
    own = {}
    with sharding.forward_passes():
        for index in sharding.share(len(groups)):
            log_probs = F.log_softmax(response_logits(model, groups[index or 0])[0], dim=-1)
            sharding.reshard()
            if index is not None:
                own[index] = log_probs.cpu()
                vocabulary = log_probs.shape[-1]
    found = []
    for index, batch in enumerate(groups):
        nothing = torch.zeros(int(batch.target_mask.sum()), vocabulary)
        found.append(ReferenceBatch(batch, sharding.sum(own.pop(index, nothing)).half(), is_anchor))
    return found


def mean_divergence(model: nn.Module, item: ReferenceBatch) -> torch.Tensor:
    """Mean `KL(reference ‖ model)` over the response tokens of a batch, in nats."""
    return divergence(model, item.batch, item.log_probs.float()).sum() / len(item.log_probs)


def distilled(
    load: Callable[[], nn.Module],
    deltas: Mapping[str, LowRankDelta],
    data: Sequence[ReferenceBatch],
    settings: DistillationSettings,
    show_progress: bool = True,
) -> tuple[dict[str, LowRankDelta], dict[str, dict[str, float]]]:
    """Trains the factors. Collective.

    Args:
        load: Loads the degraded model, plain or with its LoRA.
        deltas: Where the factors start, by canonical module name.
        data: Batches with their references, the same on every rank.
        settings: How.
        show_progress: Whether to show a progress bar.

    Returns:
        The trained deltas (float32), and the mean divergences `harmful` and `benign` before and
            after, in nats per token.

    Raises:
        ConfigError: Linearised blocks were asked for under ZeRO-3.
        UnsupportedModelError: The model has none, or they cannot be linearised.
        OutputError: There is no place for the trainer's temporary folder.
    """
    with scratch_folder("the distillation") as folder:
        # Before the model is loaded: under ZeRO-3 transformers shards what it loads from here on.
        args = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            bf16=settings.dtype == torch.bfloat16,
            use_cpu=not torch.accelerator.is_available(),
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=not may_show(show_progress),
            seed=settings.seed,
        )
        student = with_factors(load(), deltas)
        outcome = _Outcome(deltas, data)
        with expansion(student, settings.linearized_blocks):
            _DistillationTrainer(
                settings.anchor_weight,
                model=student,
                args=args,
                train_dataset=list(data),
                data_collator=lambda items: {"item": items[0]},
                callbacks=[outcome],
            ).train()
    del student
    gc.collect()  # the trainer holds the model in cycles, and the next step loads another
    return outcome.deltas, outcome.losses


class _DistillationTrainer(Trainer):
    def __init__(self, anchor_weight: float, **kwargs: Any):
        super().__init__(**kwargs)
        self._anchor_weight = anchor_weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        item: ReferenceBatch = inputs["item"]
        model.eval()  # dropout would move the student away from references made without it
        return mean_divergence(model, item) * (self._anchor_weight if item.is_anchor else 1.0)


class _Outcome(TrainerCallback):
    """The divergences at both ends of the training, and what was trained: read where the model is,
    whole or sharded.
    """

    def __init__(self, deltas: Mapping[str, LowRankDelta], data: Sequence[ReferenceBatch]):
        self.losses: dict[str, dict[str, float]] = {}
        self.deltas: dict[str, LowRankDelta] = {}
        self._modules = list(deltas)
        self._data = data

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.losses["before"] = _losses(kwargs["model"], self._data, _sharding(args, kwargs))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        sharding = _sharding(args, kwargs)
        sharding.reshard()
        self.losses["after"] = _losses(kwargs["model"], self._data, sharding)
        modules = canonical_modules(kwargs["model"])
        for name in self._modules:
            factors = _factors(modules[name])
            with torch.no_grad(), sharding.full(factors) as (a, b):
                self.deltas[name] = LowRankDelta(
                    *(tensor.float().cpu().clone() for tensor in (a, b))
                )


def _sharding(args: TrainingArguments, kwargs: Mapping[str, Any]) -> Sharding:
    return sharding_of(kwargs["model"], args.device, kwargs.get("optimizer"))


@torch.no_grad()
def _losses(
    model: nn.Module, data: Sequence[ReferenceBatch], sharding: Sharding
) -> dict[str, float]:
    """Mean divergences over the tokens of all batches of a kind; collective."""
    model.eval()
    means = sharding.values(len(data), lambda index: mean_divergence(model, data[index]))
    tokens = torch.tensor([len(item.log_probs) for item in data], dtype=torch.float64)
    found = {}
    for name, is_anchor in (("harmful", False), ("benign", True)):
        own = [index for index, item in enumerate(data) if item.is_anchor == is_anchor]
        found[name] = float((means[own] * tokens[own]).sum()) / max(1, sum(tokens[own].tolist()))
    return found


def with_factors(model: Any, deltas: Mapping[str, LowRankDelta]) -> PeftModel:
    """The model with the vector as a LoRA of its own, the only part that is trained; a LoRA it has
    already stays active.

    Raises:
        UnsupportedModelError: PEFT puts a LoRA for one of the linear layers elsewhere: in mixtures
            whose experts had such names once, on the experts.
    """
    rank, names = next(iter(deltas.values())).a.shape[0], own_names(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(names[name] for name in deltas),
        task_type="CAUSAL_LM",
    )
    try:
        if isinstance(model, PeftModel):
            own = list(model.peft_config)
            model.add_adapter(ADAPTER, config)
            tuner: Any = model.base_model
            tuner.set_adapter([*own, ADAPTER])
        else:
            model = get_peft_model(model, config, adapter_name=ADAPTER)
    except ValueError as error:
        if any(expert_weights(module) for module in model.modules()):
            raise UnsupportedModelError(_ON_EXPERTS) from error
        raise
    if config.target_parameters:
        raise UnsupportedModelError(_ON_EXPERTS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name)
    modules = canonical_modules(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            for parameter, tensor in zip(_factors(modules[name]), (delta.a, delta.b), strict=True):
                parameter.copy_(tensor)
    return model


def _factors(module: Any) -> list[torch.Tensor]:
    """The vector's live A and B on a module."""
    return [module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight]


def expansion(student: PeftModel, blocks: Blocks | None) -> AbstractContextManager:
    """Around forward and backward passes of the student: its blocks are linear in the vector, where
    there are any.

    Raises:
        ConfigError: Its weights are shared out by ZeRO-3.
        UnsupportedModelError: There are no such blocks, or they cannot be linearised.
    """
    if blocks is None:
        return nullcontext()
    if not is_whole(student):
        raise ConfigError(
            "`linearized` needs whole weights in every process: launch with `ddp` instead of `zero3`."
        )
    return linearized(student, blocks_of(student, blocks, ADAPTER), ADAPTER)
