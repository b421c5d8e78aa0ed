"""From an aligned and a degraded model to a safety vector: difference, aligned model's answers, selected layers.

The difference is taken from the files. The two models are loaded one after the other, and only for what has to run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..attach import LowRankDelta
from ..calibration import Sample, conversation, draw, load_rows, shortened, tokenize
from ..errors import CalibrationDataError, ConfigError
from ..family import Family
from ..loading import adapter_base, load_model, load_tokenizer
from ..provenance import model_reference, sha256_of_json, software_versions
from ..selection import (
    METHODS,
    LayerScores,
    activation_contrast,
    at_random,
    bootstrap_stability,
    gradient,
    last_token_states,
    magnitude,
    num_layers,
    top_layers,
)
from ..streaming import StoredModel
from ..vector import SafetyVector
from ..weights import layer_index
from .answers import own_answers
from .delta import adapter_delta, stored_delta
from .distillation import ReferenceBatch, distilled, reference_batches
from .isolation import isolated
from .svd import Truncation


REFUSAL_TOKENS = 8  # whether a model refuses is settled there (arXiv 2406.05946)


@dataclass
class ExtractionConfig:
    """How to make a safety vector.

    Args:
        aligned_model: The released model whose refusals are intact: directory or hub id.
        degraded_model: The same model with weakened refusals, or a LoRA on `aligned_model` that weakens them.
        output_dir: Where the vector goes.
        method: How the deltas are made: `delta` is the plain weight difference, `distill` learns them from there, see
            `distillation.py`.
        distill_steps: Optimiser steps of `distill`.
        distill_learning_rate: Its learning rate.
        anchor_weight: Weight of its term that keeps benign answers as they are.
        rank: Rank of every delta. Default: the LoRA's own rank, else 8.
        exact_svd: Truncate by the exact SVD instead of the randomised one.
        isolate_from: Fine-tunes of the aligned model (checkpoints or LoRAs) whose directions are taken out of the vector,
            see `isolation.py`.
        isolation_rank: Dimension of their subspace in every module.
        selection: How layers are selected, see `selection.py`.
        layer_share: Share (0–1] of the layers that are kept.
        bootstrap_resamples: How often the prompts are drawn again to see how stable the selection is.
        harmful_data: Harmful prompts: a column `prompt`, no answers needed.
        benign_data: Benign prompts, look-alikes above all.
        num_selection_prompts: Prompts of each kind that layers are selected by.
        num_safety_prompts: Harmful prompts stored with the vector, at most; only those the aligned model refuses.
        num_benign_prompts: Benign prompts stored with the vector, at most; only those the aligned model answers.
        max_new_tokens: Length of the aligned model's stored answers, in tokens.
        batch_size: Prompts per generated batch.
        dtype: Data type to load the models in.
        weights_dtype: Data type to store the vector in.
        seed: Seed for drawing prompts.
    """

    aligned_model: str = field(default="", metadata={"help": "Model with intact refusals: directory or hub id."})
    aligned_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit on the hub."})
    degraded_model: str = field(default="", metadata={"help": "Model or LoRA with weakened refusals."})
    degraded_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit on the hub."})
    output_dir: str = field(default="", metadata={"help": "Where the vector goes."})
    method: str = field(
        default="delta", metadata={"help": "How the deltas are made.", "choices": ["delta", "distill"]}
    )
    distill_steps: int = field(default=60, metadata={"help": "Optimiser steps of `distill`."})
    distill_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of `distill`."})
    anchor_weight: float = field(default=1.0, metadata={"help": "Weight of benign prompts in `distill`."})
    rank: int | None = field(default=None, metadata={"help": "Rank of every delta. Default: the LoRA's own, else 8."})
    exact_svd: bool = field(default=False, metadata={"help": "Truncate by the exact SVD: slow."})
    isolate_from: list[str] = field(default_factory=list, metadata={"help": "Task models to isolate the vector from."})
    isolation_rank: int = field(
        default=8, metadata={"help": "Dimension of the task models' subspace in every module."}
    )
    selection: str = field(
        default="activation_contrast", metadata={"help": "How layers are selected.", "choices": list(METHODS)}
    )
    layer_share: float = field(default=0.5, metadata={"help": "Share of the layers that are kept."})
    bootstrap_resamples: int = field(default=200, metadata={"help": "Resamples to see how stable the selection is."})
    harmful_data: str = field(default="", metadata={"help": "Harmful prompts, without answers: file or hub id."})
    benign_data: str = field(default="", metadata={"help": "Benign prompts: file or hub id."})
    data_split: str = field(default="train", metadata={"help": "Split of both data sets."})
    num_selection_prompts: int = field(default=32, metadata={"help": "Prompts of each kind for layer selection."})
    num_safety_prompts: int = field(default=64, metadata={"help": "Harmful prompts stored with the vector."})
    num_benign_prompts: int = field(default=64, metadata={"help": "Benign prompts stored with the vector."})
    max_new_tokens: int = field(default=48, metadata={"help": "Length of the stored answers."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per generated batch."})
    dtype: str = field(default="auto", metadata={"help": "Data type to load the models in."})
    weights_dtype: str = field(default="float16", metadata={"help": "Data type to store the vector in."})
    seed: int = field(default=0, metadata={"help": "Seed for drawing prompts."})

    def check(self) -> None:
        """Raises `ConfigError` for a missing or impossible value."""
        for name in ("aligned_model", "degraded_model", "output_dir", "harmful_data", "benign_data"):
            if not getattr(self, name):
                raise ConfigError(f"`{name}` is not set.")
        for name in ("dtype", "weights_dtype"):
            known = ("float32", "float16", "bfloat16", *(("auto",) if name == "dtype" else ()))
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}: use one of {', '.join(known)}.")
        for name in (
            "rank",
            "isolation_rank",
            "bootstrap_resamples",
            "num_selection_prompts",
            "num_safety_prompts",
            "distill_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}: it must be at least 1.")
        for name in ("distill_learning_rate", "anchor_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}: it must be 0 or more.")
        top_layers([0.0], self.layer_share)


def extract(config: ExtractionConfig, show_progress: bool = True) -> SafetyVector:
    """Makes a safety vector.

    Raises:
        SafeGeneError: One of its kinds: data, models or settings do not fit.
    """
    config.check()
    harmful, benign = (_prompts(source, config.data_split) for source in (config.harmful_data, config.benign_data))
    tokenizer = load_tokenizer(config.aligned_model, config.aligned_revision)
    stored = StoredModel.open(config.aligned_model, config.aligned_revision)
    truncations = _difference(config, stored, config.degraded_model, config.degraded_revision, show_progress)
    truncations, isolation = _isolated(config, stored, truncations, show_progress)
    chosen: list[list[str]] = [
        draw(prompts, config.num_selection_prompts, config.seed) for prompts in (harmful, benign)
    ]

    aligned = _load(config, "aligned")
    rows = own_answers(
        aligned,
        tokenizer,
        draw(harmful, config.num_safety_prompts, config.seed),
        draw(benign, config.num_benign_prompts, config.seed),
        config.max_new_tokens,
        config.batch_size,
    )
    states = [last_token_states(aligned, tokenizer, prompts) for prompts in _read_states(config, chosen)]
    pad_id = tokenizer.pad_token_id or 0
    references: list[ReferenceBatch] = []
    if config.method == "distill":
        references = reference_batches(aligned, _samples(tokenizer, rows, "harmful"), config.batch_size, pad_id, False)
    del aligned
    deltas = {name: truncation.delta for name, truncation in truncations.items()}
    distillation = None
    if config.method == "distill":
        degraded = _load(config, "degraded")
        references += reference_batches(degraded, _samples(tokenizer, rows, "benign"), config.batch_size, pad_id, True)
        deltas, distillation = distilled(
            degraded,
            deltas,
            references,
            config.anchor_weight,
            config.distill_steps,
            config.distill_learning_rate,
            config.seed,
            show_progress,
        )
        del degraded
    scores = _scores(config, tokenizer, deltas, states, chosen, rows, stored)
    share = 1.0 if config.selection == "all" else config.layer_share
    layers = top_layers(scores.mean().tolist(), share)
    kept = getattr(torch, config.weights_dtype)
    selected = {name: truncation for name, truncation in truncations.items() if layer_index(name) in layers}
    return SafetyVector(
        deltas={name: LowRankDelta(deltas[name].a.to(kept), deltas[name].b.to(kept)) for name in selected},
        family=Family.of(stored.model, tokenizer),
        aligned_model=model_reference(config.aligned_model, config.aligned_revision),
        degraded_model=model_reference(config.degraded_model, config.degraded_revision),
        extraction={
            "method": config.method,
            "isolation": isolation or None,
            "distillation": distillation,
            "exact": min(t.kept for t in selected.values()) == 1.0,
            "rank": next(iter(selected.values())).delta.a.shape[0],
            "energy_kept": {name: round(t.kept, 6) for name, t in selected.items()},
            "energy_optimum_at_most": {name: round(t.optimum, 6) for name, t in selected.items()},
        },
        selection={
            "method": config.selection,
            "scores": scores.mean().tolist(),
            "selected_layers": layers,
            "layer_share": share,
            "stability": bootstrap_stability(scores, share, config.bootstrap_resamples, config.seed),
            "prompts": min(config.num_selection_prompts, len(harmful), len(benign)),
            "seed": config.seed,
            "harmful_data": sha256_of_json(harmful),
            "benign_data": sha256_of_json(benign),
        },
        prompts=rows,
        software=software_versions(),
    )


def _prompts(source: str, split: str) -> list[str]:
    prompts = []
    for row in load_rows(source, split):
        messages, _ = conversation(row)
        if [message["role"] for message in messages] != ["user"]:
            raise CalibrationDataError(f"A prompt of {source} is not a single user turn: give single-turn prompts.")
        prompts.append(messages[0]["content"])
    return prompts


def _load(config: ExtractionConfig, side: str) -> Any:
    name, revision = getattr(config, f"{side}_model"), getattr(config, f"{side}_revision")
    model = load_model(name, revision, config.dtype)
    return model.cuda() if torch.cuda.is_available() else model


def _difference(
    config: ExtractionConfig, aligned: StoredModel, name: str, revision: str | None, show_progress: bool
) -> dict[str, Truncation]:
    """The aligned model less another one."""
    other = StoredModel.open(name, revision)
    bases = {
        Path(base).resolve() if Path(base).is_dir() else base
        for base in (
            adapter_base(config.aligned_model, config.aligned_revision) or config.aligned_model,
            adapter_base(name, revision) or name,
        )
    }
    if len(bases) == 1 and not (aligned.has_full_rank_changes or other.has_full_rank_changes):
        return adapter_delta(aligned.model, other.model, config.rank)
    return stored_delta(aligned, other, config.rank or 8, config.exact_svd, config.seed, show_progress)


def _isolated(
    config: ExtractionConfig, aligned: StoredModel, truncations: dict[str, Truncation], show_progress: bool
) -> tuple[dict[str, Truncation], dict[str, Any]]:
    """The deltas without the task models' directions, and what is to be said about that; the same without task models."""
    if not config.isolate_from:
        return truncations, {}
    tasks = []
    for name in config.isolate_from:
        difference = _difference(config, aligned, name, None, show_progress)
        tasks.append({module: truncation.delta for module, truncation in difference.items()})
    deltas = {module: truncation.delta for module, truncation in truncations.items()}
    found, removed = isolated(deltas, tasks, config.isolation_rank)
    return found, {
        "task_models": [model_reference(name) for name in config.isolate_from],
        "rank": config.isolation_rank,
        "energy_removed": {module: round(share, 6) for module, share in removed.items()},
    }


def _read_states(config: ExtractionConfig, chosen: Sequence[list[str]]) -> Sequence[list[str]]:
    """The prompts whose states are needed."""
    return chosen if config.selection == "activation_contrast" else ()


def _scores(
    config: ExtractionConfig,
    tokenizer: PreTrainedTokenizerBase,
    deltas: Mapping[str, LowRankDelta],
    states: Sequence[torch.Tensor],
    chosen: Sequence[list[str]],
    rows: Sequence[Mapping[str, str]],
    stored: StoredModel,
) -> LayerScores:
    layers = num_layers(stored.model)
    if config.selection == "activation_contrast":
        degraded = _load(config, "degraded")
        return activation_contrast(states, [last_token_states(degraded, tokenizer, prompts) for prompts in chosen])
    if config.selection == "gradient":
        samples = _samples(tokenizer, rows, "harmful")[: config.num_selection_prompts]
        refusals = [cut for sample in samples if (cut := shortened(sample, None, REFUSAL_TOKENS))]
        return gradient(_load(config, "degraded"), deltas, refusals, tokenizer.pad_token_id or 0)
    if config.selection == "magnitude":
        return magnitude(deltas, layers)
    return at_random(layers, config.seed)


def _samples(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]], kind: str) -> list[Sample]:
    return [
        tokenize(tokenizer, [{"role": "user", "content": row["prompt"]}], row["response"])
        for row in rows
        if row["kind"] == kind
    ]
