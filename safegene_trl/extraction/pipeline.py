"""From an aligned and a degraded model to a safety vector: difference, aligned model's answers,
selected layers.

The difference is taken from the files, by one process. The two models are loaded one after the
other, and only for what has to run: whole in every process, or sharded by ZeRO-3 where the launch
asks for it.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoints.loading import load_model, load_placed, load_tokenizer, resolve_dtype
from ..checkpoints.source import adapter_base
from ..checkpoints.stored_merge import StoredModel
from ..data.prompts import PLAIN
from ..data.rows import conversation
from ..data.sources import draw, load_rows
from ..distributed.layouts import Sharding
from ..errors import CalibrationDataError, FamilyError, UnsupportedModelError
from ..models.inputs import Sample, padding_id, shortened, tokenize
from ..models.low_rank import LowRankDelta, broadcast_deltas
from ..models.names import layer_index
from ..provenance import model_reference, sha256_of_json, software_versions
from ..vectors.family import Family
from ..vectors.safety_vector import SafetyVector
from .answers import own_answers
from .config import ExtractionConfig
from .coverage import Coverage, adapter_coverage
from .delta import adapter_delta, stored_difference
from .distillation import DistillationSettings, ReferenceBatch, reference_batches
from .isolation import isolated
from .linearization import Blocks
from .methods import METHODS, Difference
from .selection import (
    SELECTIONS,
    Evidence,
    LayerScores,
    bootstrap_stability,
    last_token_states,
    top_layers,
)
from .soundness import check_runs, in_dtype
from .svd import Truncation


logger = logging.getLogger(__name__)
REFUSAL_TOKENS = 8  # whether a model refuses is settled there (arXiv 2406.05946)


@dataclass(frozen=True)
class _AlignedSide:
    """What the aligned model is loaded for: its own answers, its states where they select layers,
    what is distilled.
    """

    rows: list[dict[str, str]]
    states: list[torch.Tensor]
    references: list[ReferenceBatch]


def make_vector(
    config: ExtractionConfig, job: Sharding, show_progress: bool = True
) -> SafetyVector | None:
    """Makes a safety vector and saves nothing. Collective; rank 0 has it then, the others None.

    Args:
        config: How.
        job: The processes of this job, from `this_job`.
        show_progress: Whether to show progress bars.

    Raises:
        SafeGeneError: One of its kinds: data, models or settings do not fit.
    """
    show_progress = show_progress and job.is_main
    truncations: dict[str, Truncation] = {}
    with job.raising_together():
        config.check()
        harmful, benign = (
            read_prompts(source, config.data_split)
            for source in (config.harmful_data, config.benign_data)
        )
        categories = read_categories(config.harmful_data, config.data_split)
        tokenizer = load_tokenizer(config.aligned_model, config.aligned_revision)
        if job.is_main:
            _check_template(config, tokenizer)
            stored = StoredModel.open(config.aligned_model, config.aligned_revision)
            name, revision = config.degraded_model, config.degraded_revision
            truncations, coverage = _difference(config, stored, name, revision, show_progress)
            if warning := coverage.check():
                logger.warning(warning)
            truncations, isolation = _isolated(config, stored, truncations, show_progress)
    deltas = broadcast_deltas(
        {name: truncation.delta for name, truncation in truncations.items()}, job
    )
    aligned = _aligned_side(config, tokenizer, harmful, benign, job)
    difference = _difference_of(config, tokenizer, deltas, aligned, job, show_progress)
    deltas, distillation = METHODS[config.method].make(difference)
    scores = _scores(config, tokenizer, deltas, aligned, harmful, benign, job)
    if not job.is_main:
        return None
    share = config.selected_share
    layers = top_layers(scores.mean().tolist(), share)
    selected = {
        name: truncation for name, truncation in truncations.items() if layer_index(name) in layers
    }
    return SafetyVector(
        deltas=in_dtype(
            {name: deltas[name] for name in selected}, getattr(torch, config.weights_dtype)
        ),
        family=Family.of(stored.model, tokenizer),
        aligned_model=model_reference(config.aligned_model, config.aligned_revision),
        degraded_model=model_reference(config.degraded_model, config.degraded_revision),
        extraction={
            "method": config.method,
            "covered_share": round(coverage.share, 6),
            "isolation": isolation,
            "distillation": distillation,
            **_truncation_record(selected),
        },
        selection={
            "method": config.selection,
            "scores": scores.mean().tolist(),
            "selected_layers": layers,
            "layer_share": share,
            "stability": bootstrap_stability(
                scores, share, config.bootstrap_resamples, config.seed
            ),
            "prompts": min(config.num_selection_prompts, len(harmful), len(benign)),
            "seed": config.seed,
            "harmful_data": sha256_of_json(harmful),
            "benign_data": sha256_of_json(benign),
            "categories": _refused_by_category(config, harmful, aligned.rows, categories),
        },
        prompts=[
            row | {"category": categories[row["prompt"]]} if row["prompt"] in categories else row
            for row in aligned.rows
        ],
        software=software_versions(),
    )


def _check_template(config: ExtractionConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns where prompts are encoded as plain text, and refuses that where the degraded model has
    a chat template.
    """
    if tokenizer.chat_template:
        return
    with suppress(UnsupportedModelError):  # it comes without a tokenizer
        if load_tokenizer(config.degraded_model, config.degraded_revision).chat_template:
            raise FamilyError(
                f"The tokenizer of {config.degraded_model} has a chat template and that of {config.aligned_model} has none: save "
                "the chat template into the aligned model, too."
            )
    logger.warning(PLAIN, config.aligned_model)


def _truncation_record(selected: Mapping[str, Truncation]) -> dict[str, Any]:
    return {
        "exact": min(t.kept for t in selected.values()) == 1.0,
        "rank": next(iter(selected.values())).delta.a.shape[0],
        "energy_kept": {name: round(t.kept, 6) for name, t in selected.items()},
        "energy_optimum_at_most": {name: round(t.optimum, 6) for name, t in selected.items()},
    }


def _aligned_side(
    config: ExtractionConfig,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
    job: Sharding,
) -> _AlignedSide:
    model, sharding = load_placed(config.aligned_model, config.aligned_revision, config.dtype, job)
    check_runs(model, tokenizer, harmful[0], sharding, config.aligned_model)
    rows = own_answers(
        model,
        tokenizer,
        draw(harmful, config.num_safety_prompts, config.seed),
        draw(benign, config.num_benign_prompts, config.seed),
        config.max_new_tokens,
        config.batch_size,
        sharding,
    )
    states, references = [], []
    if SELECTIONS[config.selection].reads_states:
        states = _states(config, model, tokenizer, harmful, benign, sharding)
    if METHODS[config.method].distils:
        references = _references(config, model, tokenizer, rows, "harmful", sharding)
    return _AlignedSide(rows, states, references)


def _difference_of(
    config: ExtractionConfig,
    tokenizer: PreTrainedTokenizerBase,
    deltas: Mapping[str, LowRankDelta],
    aligned: _AlignedSide,
    job: Sharding,
    show_progress: bool,
) -> Difference:
    name, revision = config.degraded_model, config.degraded_revision

    def references() -> list[ReferenceBatch]:
        degraded, sharding = _degraded(config, tokenizer, aligned.rows[0]["prompt"], job)
        benign = _references(config, degraded, tokenizer, aligned.rows, "benign", sharding)
        return [*aligned.references, *benign]

    def settings() -> DistillationSettings:
        return DistillationSettings(
            config.distill_steps,
            config.distill_learning_rate,
            config.anchor_weight,
            config.seed,
            getattr(torch, resolve_dtype(config.dtype, name, revision)),
        )

    return Difference(
        deltas,
        settings,
        cast(Blocks, config.linearized_blocks),
        lambda: load_model(name, revision, resolve_dtype(config.dtype, name, revision)),
        references,
        show_progress,
        job.world_size,
    )


def _degraded(
    config: ExtractionConfig, tokenizer: PreTrainedTokenizerBase, prompt: str, job: Sharding
) -> tuple[nn.Module, Sharding]:
    """Collective: the degraded model, which has been seen to run on a prompt."""
    name, revision = config.degraded_model, config.degraded_revision
    model, sharding = load_placed(name, revision, config.dtype, job)
    check_runs(model, tokenizer, prompt, sharding, name)
    return model, sharding


def read_prompts(source: str, split: str) -> list[str]:
    """The prompts of a data set, each one user turn."""
    prompts = []
    for row in load_rows(source, split):
        messages, _ = conversation(row)
        if [message["role"] for message in messages] != ["user"]:
            raise CalibrationDataError(
                f"A prompt of {source} is not a single user turn: give single-turn prompts."
            )
        prompts.append(messages[0]["content"])
    return prompts


def read_categories(source: str, split: str) -> dict[str, str]:
    """The category of every prompt of a data set that has a column `category`."""
    rows = load_rows(source, split)
    if "category" not in rows.column_names:
        return {}
    return {
        conversation(row)[0][0]["content"]: str(row["category"])
        for row in rows
        if row["category"] is not None
    }


def _refused_by_category(
    config: ExtractionConfig,
    harmful: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    categories: Mapping[str, str],
) -> dict[str, dict[str, int]]:
    """How many prompts of each category the aligned model was asked, and how many it refused: where
    few, the vector is weak.
    """
    refused = {row["prompt"] for row in rows}
    found: dict[str, dict[str, int]] = {}
    asked: list[str] = draw(harmful, config.num_safety_prompts, config.seed)
    for prompt in asked:
        if prompt in categories:
            count = found.setdefault(categories[prompt], {"asked": 0, "refused": 0})
            count["asked"] += 1
            count["refused"] += prompt in refused
    return dict(sorted(found.items()))


def _difference(
    config: ExtractionConfig,
    aligned: StoredModel,
    name: str,
    revision: str | None,
    show_progress: bool,
) -> tuple[dict[str, Truncation], Coverage]:
    """The aligned model less another one, and how much of their difference that is."""
    other = StoredModel.open(name, revision)
    if differ_by_adapters(config, aligned, other, name, revision):
        found = adapter_delta(aligned.model, other.model, config.rank)
        return found, adapter_coverage(aligned, other, found)
    return stored_difference(
        aligned, other, config.rank or 8, config.exact_svd, config.seed, show_progress
    )


def differ_by_adapters(
    config: ExtractionConfig,
    aligned: StoredModel,
    other: StoredModel,
    name: str,
    revision: str | None,
) -> bool:
    """Whether the aligned model and another one, of this name, are one base model with nothing but
    LoRAs on it.
    """
    bases = {
        Path(base).resolve() if Path(base).is_dir() else base
        for base in (
            adapter_base(config.aligned_model, config.aligned_revision) or config.aligned_model,
            adapter_base(name, revision) or name,
        )
    }
    return len(bases) == 1 and not (aligned.has_full_rank_changes or other.has_full_rank_changes)


def _isolated(
    config: ExtractionConfig,
    aligned: StoredModel,
    truncations: dict[str, Truncation],
    show_progress: bool,
) -> tuple[dict[str, Truncation], dict[str, Any] | None]:
    """The deltas without the task models' directions, and what is to be said about that; the same
    without task models.
    """
    if not config.isolate_from:
        return truncations, None
    tasks = []
    for name in config.isolate_from:
        difference, _ = _difference(config, aligned, name, None, show_progress)
        tasks.append({module: truncation.delta for module, truncation in difference.items()})
    deltas = {module: truncation.delta for module, truncation in truncations.items()}
    found, removed = isolated(deltas, tasks, config.isolation_rank)
    return found, {
        "task_models": [model_reference(name) for name in config.isolate_from],
        "rank": config.isolation_rank,
        "energy_removed": {module: round(share, 6) for module, share in removed.items()},
    }


def _scores(
    config: ExtractionConfig,
    tokenizer: PreTrainedTokenizerBase,
    deltas: Mapping[str, LowRankDelta],
    aligned: _AlignedSide,
    harmful: Sequence[str],
    benign: Sequence[str],
    job: Sharding,
) -> LayerScores:
    samples = _samples(tokenizer, aligned.rows, "harmful")[: config.num_selection_prompts]
    evidence = Evidence(
        deltas,
        [cut for sample in samples if (cut := shortened(sample, None, REFUSAL_TOKENS))],
        aligned.states,
        lambda: _degraded(config, tokenizer, harmful[0], job),
        lambda model, sharding: _states(config, model, tokenizer, harmful, benign, sharding),
        padding_id(tokenizer),
        config.seed,
    )
    return SELECTIONS[config.selection].scores(evidence)


def _states(
    config: ExtractionConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
    sharding: Sharding,
) -> list[torch.Tensor]:
    """States on the prompts of each kind that layers are selected by."""
    count, seed = config.num_selection_prompts, config.seed
    chosen: list[list[str]] = [draw(harmful, count, seed), draw(benign, count, seed)]
    return [last_token_states(model, tokenizer, prompts, sharding) for prompts in chosen]


def _references(
    config: ExtractionConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    kind: str,
    sharding: Sharding,
) -> list[ReferenceBatch]:
    samples = _samples(tokenizer, rows, kind)
    return reference_batches(
        model, samples, config.batch_size, padding_id(tokenizer), kind == "benign", sharding
    )


def _samples(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]], kind: str
) -> list[Sample]:
    return [
        tokenize(tokenizer, [{"role": "user", "content": row["prompt"]}], row["response"])
        for row in rows
        if row["kind"] == kind
    ]
