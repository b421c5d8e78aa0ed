"""Before a step on a live model: all that can be checked is checked, and what the search needs is
read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn

from ..checkpoints.live_merge import check_ranges, checkpoint_bytes
from ..checkpoints.reloaded import can_reload, reloaded
from ..checkpoints.zero_shards import holds_only_zero_shards
from ..config.settings import SafeGeneConfig
from ..data.rows import Row
from ..data.shots import Shots, gather_shots, within_vocabulary
from ..distributed.layouts import Sharding
from ..distributed.shapes import class_name
from ..errors import ConfigError, UnsupportedModelError
from ..models.attachment import VectorAttachment, frozen_for_calibration
from ..models.batch_size import NO_ROOM_TO_CHECK, check_room, naming_shortage
from ..models.data_types import WrittenTypes
from ..models.inputs import Batch, batches, padding_id
from ..models.losses import response_logits
from ..models.parameters import (
    base_model,
    canonical_parameters,
    context_length,
    vocabulary_rows,
)
from ..models.replacement import without_adapters
from ..models.supported import check_adapter_output, check_supported
from ..text import one_line
from ..vectors.safety_vector import SafetyVector
from .decision import check_measurable
from .history import last_accepted, read_history
from .lineage import Coefficients, canonical, check_verified, reported_coefficients, vector_id
from .plan import FINE_TUNE, InputModel, Origin, Plan, check_base_vocabulary, plan_step
from .probe import MORE_THAN_WEIGHTS, RELOADED_TOLERANCE
from .quantized_step import QuantizedStep, quantized_step
from .repair import check_repair


@dataclass
class Preparation:
    """A plan with what the search needs.

    Attributes:
        start: Coefficients at which the search starts, by name; None for its default.
        quantized: What a quantised base asks for, None where it is not quantised.
    """

    plan: Plan
    shots: Shots
    start: Coefficients | None
    quantized: QuantizedStep | None = None

    @property
    def target(self) -> Path:
        return self.plan.target

    @property
    def sharding(self) -> Sharding:
        return self.plan.sharding


@naming_shortage(NO_ROOM_TO_CHECK)
def prepare(
    config: SafeGeneConfig,
    input_model: InputModel,
    target: Path,
    sharding: Sharding,
    task_rows: Sequence[Row] | IterableDataset | None = None,
    packed: bool | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> Preparation:
    """Reads and checks vector, family, data and output place, and that the vector reaches the
    logits; writes nothing.

    Collective, like everything here: every rank calls it, and if it fails on one it raises on all.

    Args:
        config: What to do.
        input_model: The live model, plain or PEFT-wrapped.
        target: Folder of the checkpoint to be.
        sharding: How the model is spread over ranks.
        task_rows: The training set, used where `config.data.task_data` names no other.
        packed: Whether its rows were packed without keeping their boundaries. Default: told from
            the rows.
        template_options: Arguments for the chat template that the training uses, as far as they
            are known.

    Raises:
        SafeGeneError: One of its kinds, saying what to do.
    """
    model = input_model.model
    with sharding.raising_together():
        check_supported(model)
        if config.output.output_format != "merged":
            check_adapter_output(model)
            _check_base(input_model.origin)
            check_base_vocabulary(model, input_model.origin)
        types = input_model.written_types(config)
        needed = 0 if config.output.output_format == "adapter" else checkpoint_bytes(model, types)
    quantized = quantized_step(config, input_model, sharding)
    if quantized is None:
        _check_types(model, types, sharding)
    else:
        needed = quantized.needed_bytes
    plan = plan_step(config, input_model, target, sharding, needed)
    if quantized is not None:
        with plan.clock.phase("prepare"), sharding.on_main_rank() as working:
            if working:
                quantized.check(model, plan)
    with plan.clock.phase("prepare"), sharding.raising_together():
        check_repair(config, plan.vector.deltas)
        plan.find_carried(model, config.search.granularity)
        check_verified(plan.carried)
        context = context_length(model)
        shots = gather_shots(
            config, plan.vector, plan.tokenizer, context, task_rows, packed, template_options
        )
        shots = within_vocabulary(shots, vocabulary_rows(model))
        if config.gate:
            unseen = shots.unseen
            check_measurable(config.gate, unseen.counts, unseen.verdicts, unseen.categories)
        start = first_coefficients(config, plan.vector)
    sharding.check_same("samples", json.dumps(shots.record, sort_keys=True))
    sharding.check_same("coefficients to start from", json.dumps(start, sort_keys=True))
    lowest = min(plan.vector.layers)
    check_room(config.batch_size, base_model(model), shots.data.samples, lowest, sharding)
    plan.report.data = shots.record
    plan.report.warnings += shots.warnings
    with plan.clock.phase("prepare"):
        attachment = VectorAttachment(
            model,
            plan.vector.deltas,
            plan.vector.space(config.search.granularity),
            sharding,
            plan.carried,
        )
        sample = _shortest(shots, plan)
        _check_reloads(model, sample, sharding)
        attachment.verify(sample)
    return Preparation(plan, shots, start, quantized)


def _check_types(model: nn.Module, types: WrittenTypes, sharding: Sharding) -> None:
    """Collective: raises where a merged checkpoint could not be measured, or written, in these data
    types.
    """
    with sharding.raising_together():
        types.check_measurable(canonical_parameters(model))
    check_ranges(model, types, sharding)


def _check_base(origin: Origin) -> None:
    """Raises `UnsupportedModelError` where PEFT could not load the finished full fine-tune that an
    adapter would be relative to.
    """
    place = origin.places.get(FINE_TUNE)
    if place is not None and origin.kind == "full" and holds_only_zero_shards(Path(place)):
        raise UnsupportedModelError(
            f"{place} holds only DeepSpeed's own shards, which PEFT cannot load as the base model of an adapter: convert them by "
            "DeepSpeed's `zero_to_fp32.py --safe_serialization`, or set `output.output_format` to `merged`."
        )


@torch.no_grad()
def _check_reloads(model: nn.Module, sample: Batch, sharding: Sharding) -> None:
    """Raises `UnsupportedModelError` where a model loaded from a checkpoint of the live one would
    compute something else.
    """
    if not can_reload(model, sharding):
        return
    with frozen_for_calibration(model), without_adapters(model), sharding.raising_together():
        config = base_model(model).config
        fresh = reloaded(model, type(config).from_dict(config.to_dict()))
        # of a model that has diverged already something else is to be said
        here, there = (_text_logits(each, sample).nan_to_num() for each in (model, fresh))
        distance = float((here - there).abs().max())
        if not distance <= RELOADED_TOLERANCE * max(1.0, float(here.abs().max())):
            raise UnsupportedModelError(MORE_THAN_WEIGHTS.format(distance=f"{distance:.3g}"))


def _text_logits(model: nn.Module, sample: Batch) -> torch.Tensor:
    """Logits of a sample's response.

    Raises:
        UnsupportedModelError: The model does not read text alone.
    """
    try:
        return response_logits(model, sample)[0]
    except (AttributeError, TypeError, ValueError) as error:  # of a class of text and images
        raise UnsupportedModelError(
            f"{class_name(base_model(model))} does not compute logits of text alone ({one_line(error)}): train the class of its "
            "text model."
        ) from error


def _shortest(shots: Shots, plan: Plan) -> Batch:
    """One short sample."""
    sample = min(shots.data.harmful.fit, key=lambda sample: len(sample.input_ids))
    return batches([sample], 1, padding_id(plan.tokenizer), plan.sharding.device)[0]


def first_coefficients(config: SafeGeneConfig, vector: SafetyVector) -> Coefficients | None:
    """Those of the release that the search is to start from, None where there is none."""
    space = vector.space(config.search.granularity)
    if config.search.warm_start is not None:
        found = space.refined(reported_coefficients(config.search.warm_start, vector))
        if found is None:
            raise ConfigError(
                f"The coefficients in {config.search.warm_start} are not one per {config.search.granularity}: set `search.granularity` as it was "
                "there."
            )
        return found
    last = (
        last_accepted(read_history(Path(config.output.history))) if config.output.history else None
    )
    if last is None or last["vector"]["sha256"] != vector_id(vector):
        return None
    return space.refined(canonical(last["coefficients"]))
