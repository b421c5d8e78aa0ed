"""From an aligned and a degraded model to a safety vector: difference, aligned model's answers,
selected layers.

The difference is taken from the files (`difference.py`). The two models are loaded one after the
other, and only for what has to run: whole in every process, or sharded by ZeRO-3 where the launch
asks for it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoints.loading import load_model, load_placed, load_tokenizer, resolve_dtype
from ..data.prompt_style import target_record
from ..data.prompts import PLAIN
from ..distributed.layouts import Sharding
from ..errors import ConfigError, FamilyError, UnsupportedModelError
from ..models.inputs import padding_id, shortened
from ..models.low_rank import LowRankDelta, broadcast_deltas
from ..models.names import layer_index
from ..provenance import model_reference, software_versions
from ..vectors.family import Family
from ..vectors.prompt_rows import Part
from ..vectors.safety_vector import SafetyVector
from .aligned_rows import (
    REFUSAL_TOKENS,
    Inputs,
    answered,
    prompts_to_measure_on,
    samples_of,
    with_targets,
)
from .by_category import CategoryPrompts, split_by_category
from .config import ExtractionConfig
from .difference import take_difference, truncation_record
from .distillation import DistillationSettings, ReferenceBatch, reference_batches
from .linearization import Blocks
from .methods import METHODS, Made, MethodInputs
from .prompts import ExtractionPrompts
from .selection import (
    SELECTIONS,
    Evidence,
    LayerScores,
    bootstrap_stability,
    last_token_states,
    top_layers,
)
from .soundness import check_runs, in_dtype


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _AlignedSide:
    """What the aligned model is loaded for: its own answers, prompts to measure on with a record of
    them, its states where they select layers, what is distilled.
    """

    rows: list[dict[str, Any]]
    tests: list[dict[str, Any]]
    test_record: dict[str, Any]
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
    difference, make = None, _made_by(config)
    with job.raising_together():
        config.check()
        prompts = ExtractionPrompts.read(config)
        by = prompts.by_category()
        tokenizer = load_tokenizer(config.aligned_model, config.aligned_revision)
        style = config.target(tokenizer)
        if job.is_main:
            _check_template(config, tokenizer)
            difference = take_difference(config, show_progress)
    inputs = Inputs(config, tokenizer, prompts, job, style)
    deltas = broadcast_deltas(difference.deltas if difference else {}, job)
    aligned = _aligned_side(inputs)
    found = _method_inputs(inputs, deltas, aligned, show_progress)
    deltas, distillation = make(found)
    scores = _scores(inputs, deltas, aligned)
    layers = top_layers(scores.mean().tolist(), config.selected_share)
    chosen = {name: delta for name, delta in deltas.items() if layer_index(name) in layers}
    chosen, components = _components(inputs, chosen, by)
    if difference is None:
        return None
    selected = {name: difference.truncations[name] for name in chosen}
    return SafetyVector(
        deltas=in_dtype(chosen, getattr(torch, config.weights_dtype)),
        family=Family.of(difference.aligned.model, tokenizer),
        aligned_model=model_reference(config.aligned_model, config.aligned_revision),
        degraded_model=model_reference(config.degraded_model, config.degraded_revision),
        extraction={
            "method": config.method,
            "covered_share": round(difference.coverage.share, 6),
            "isolation": difference.isolation,
            "distillation": distillation,
            **({"chat_template_kwargs": dict(style.options)} if style.options else {}),
            **target_record(style),
            **truncation_record(selected),
            **components,
        },
        selection=_selection_record(config, scores, layers)
        | prompts.record(aligned.rows)
        | aligned.test_record,
        prompts=prompts.with_categories([*aligned.rows, *aligned.tests]),
        software=software_versions(),
    )


def _components(
    inputs: Inputs, deltas: dict[str, LowRankDelta], prompts: CategoryPrompts | None
) -> tuple[dict[str, LowRankDelta], dict[str, Any]]:
    """Collective: the deltas by category and the record of it; as they are without categories. The
    aligned model is loaded again, as what is split is known only here.
    """
    if prompts is None:
        return deltas, {}
    config = inputs.config
    model, sharding = load_placed(
        config.aligned_model, config.aligned_revision, config.dtype, inputs.job
    )
    made = split_by_category(deltas, prompts, model, inputs.tokenizer, inputs.style, sharding)
    return made.deltas, made.record


def _made_by(config: ExtractionConfig) -> Callable[[MethodInputs], Made]:
    """What makes deltas of a difference; raises `ConfigError` for a method without one."""
    make = METHODS[config.method].make
    if make is None:
        raise ConfigError(
            f"`method` is `{config.method}`, which takes no difference of two models: call `extract`."
        )
    return make


def _selection_record(
    config: ExtractionConfig, scores: LayerScores, layers: list[int]
) -> dict[str, Any]:
    """How the layers were selected."""
    share = config.selected_share
    return {
        "method": config.selection,
        "scores": scores.mean().tolist(),
        "selected_layers": layers,
        "layer_share": share,
        "stability": bootstrap_stability(scores, share, config.bootstrap_resamples, config.seed),
    }


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


def _aligned_side(inputs: Inputs) -> _AlignedSide:
    config, tokenizer = inputs.config, inputs.tokenizer
    model, sharding = load_placed(
        config.aligned_model, config.aligned_revision, config.dtype, inputs.job
    )
    check_runs(model, tokenizer, inputs.prompts.harmful[0], sharding, config.aligned_model)
    rows = with_targets(inputs, model, answered(inputs, model, sharding), sharding)
    tests, test_record = prompts_to_measure_on(inputs, model, sharding)
    states, references = [], []
    if SELECTIONS[config.selection].reads_states:
        states = _states(inputs, model, sharding)
    if METHODS[config.method].distils:
        references = _references(inputs, model, rows, "harmful", sharding)
    return _AlignedSide(rows, tests, test_record, states, references)


def _method_inputs(
    inputs: Inputs,
    deltas: Mapping[str, LowRankDelta],
    aligned: _AlignedSide,
    show_progress: bool,
) -> MethodInputs:
    config = inputs.config
    name, revision = config.degraded_model, config.degraded_revision

    def references() -> list[ReferenceBatch]:
        degraded, sharding = _degraded(inputs, aligned.rows[0]["prompt"])
        benign = _references(inputs, degraded, aligned.rows, "benign", sharding)
        return [*aligned.references, *benign]

    def settings() -> DistillationSettings:
        return DistillationSettings(
            config.distill_steps,
            config.distill_learning_rate,
            config.anchor_weight,
            config.seed,
            getattr(torch, resolve_dtype(config.dtype, name, revision)),
        )

    return MethodInputs(
        deltas,
        settings,
        cast(Blocks, config.linearized_blocks),
        lambda: load_model(name, revision, resolve_dtype(config.dtype, name, revision)),
        references,
        show_progress,
        inputs.job.world_size,
    )


def _degraded(inputs: Inputs, prompt: str) -> tuple[nn.Module, Sharding]:
    """Collective: the degraded model, which has been seen to run on a prompt."""
    name, revision = inputs.config.degraded_model, inputs.config.degraded_revision
    model, sharding = load_placed(name, revision, inputs.config.dtype, inputs.job)
    check_runs(model, inputs.tokenizer, prompt, sharding, name)
    return model, sharding


def _scores(
    inputs: Inputs, deltas: Mapping[str, LowRankDelta], aligned: _AlignedSide
) -> LayerScores:
    config, tokenizer = inputs.config, inputs.tokenizer
    samples = samples_of(inputs, aligned.rows, "harmful")[: config.num_selection_prompts]
    evidence = Evidence(
        deltas,
        [cut for sample in samples if (cut := shortened(sample, None, REFUSAL_TOKENS))],
        aligned.states,
        lambda: _degraded(inputs, inputs.prompts.harmful[0]),
        lambda model, sharding: _states(inputs, model, sharding),
        padding_id(tokenizer),
        config.seed,
    )
    return SELECTIONS[config.selection].scores(evidence)


def _states(inputs: Inputs, model: Any, sharding: Sharding) -> list[torch.Tensor]:
    """States on the prompts of each kind that layers are selected by."""
    return [
        last_token_states(model, inputs.tokenizer, prompts, sharding, inputs.style)
        for prompts in inputs.prompts.to_select_by()
    ]


def _references(
    inputs: Inputs,
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    kind: Part,
    sharding: Sharding,
) -> list[ReferenceBatch]:
    pad_id, size = padding_id(inputs.tokenizer), inputs.config.samples_per_step
    samples = samples_of(inputs, rows, kind)
    return reference_batches(model, samples, size, pad_id, kind == "benign", sharding)
