"""`transport`: a safety vector for a model from the direction of another one, of any architecture.

The direction of the source is carried over by a map fitted on benign anchors (arXiv 2606.05290; also
2605.09875, 2601.16034), and written into the weights of the target, which no paper does:

    ΔW_m = (T(v_l) / k_l) u_mᵀ

for each of the `k_l` modules of layer `l` that write to the residual stream, `u_m` a detector of
harmful prompts at the module's own input. On a harmful prompt `u_mᵀ x ≈ 1`, so that with λ = 1 the
modules of a layer move the residual stream by `T(v_l)` together, and on others by about nothing.

Nothing of the target is unsafe: no degraded model, no harmful answers, and of harmful prompts only the
words.
"""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checkpoints.loading import load_placed, load_tokenizer
from ...checkpoints.scratch import scratch_folder
from ...checkpoints.stored_model import StoredModel
from ...data.prompt_style import target_record
from ...data.prompts import PLAIN
from ...distributed.layouts import Sharding
from ...errors import VectorError
from ...models.low_rank import LowRankDelta
from ...models.names import layer_index
from ...provenance import model_reference, sha256_of_json, software_versions
from ...vectors.family import Family
from ...vectors.safety_vector import SafetyVector
from ..aligned_rows import Inputs, prompts_to_measure_on
from ..config import ExtractionConfig
from ..prompts import ExtractionPrompts
from ..selection import (
    SELECTIONS,
    Evidence,
    LayerScores,
    bootstrap_stability,
    top_layers,
)
from ..soundness import check_runs, in_dtype
from .anchors import read_anchors
from .carry import CarriedLayer, carry, scores
from .detectors import POOR, Detector, detector
from .directions import check_enough
from .maps import split
from .refusals import StoredRows, stored_rows, with_refusals
from .sides import (
    SourceStates,
    TargetStates,
    Texts,
    check_other_family,
    read_source,
    read_source_vector,
    read_target,
)
from .states import Reader


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Answers:
    """What the target is asked: rows to learn from, prompts to measure on and a record of those."""

    stored: StoredRows
    tests: list[dict[str, Any]]
    test_record: dict[str, Any]


@dataclass(frozen=True)
class _Written:
    """The direction as deltas of the weights.

    Attributes:
        deltas: By module, of the layers that were selected.
        detectors: By module.
        scores: Of all layers.
        layers: Those that were selected.
    """

    deltas: dict[str, LowRankDelta]
    detectors: dict[str, Detector]
    scores: LayerScores
    layers: list[int]


def make_transported(config: ExtractionConfig, job: Sharding) -> SafetyVector | None:
    """Makes a safety vector of the aligned model from another model's direction, and saves nothing.
    Collective; rank 0 has it then, the others None.

    Args:
        config: How.
        job: The processes of this job, from `this_job`.

    Raises:
        SafeGeneError: One of its kinds: data, models or settings do not fit, the source shows no
            direction, or no map is good enough.
    """
    vector = None
    with job.raising_together():
        config.check()
        prompts = ExtractionPrompts.read(config)
        harmful, benign = prompts.to_answer()
        check_enough(harmful, benign)
        texts = Texts(read_anchors(config, prompts.harmful), harmful, benign)
        tokenizer = load_tokenizer(config.aligned_model, config.aligned_revision)
        style = config.target(tokenizer)
        if job.is_main:
            check_other_family(config)
            if not tokenizer.chat_template:
                logger.warning(PLAIN, config.aligned_model)
        if config.source_vector:
            vector = read_source_vector(config)
    inputs = Inputs(config, tokenizer, prompts, job, style)
    with scratch_folder("the hidden states of a transport") as place:
        source = read_source(config, texts, vector, Path(place), job)
        gc.collect()
        carried, written, answers = _into_target(inputs, texts, source, Path(place))
    stored = with_refusals(config, answers.stored, inputs)
    if written is None:
        return None
    record = {
        **_source_record(config, vector),
        "anchors": _anchor_record(texts),
        **_record(carried, written),
        "refusals": stored.record,
    }
    return _vector(inputs, written, record, _Answers(stored, answers.tests, answers.test_record))


def _into_target(
    inputs: Inputs, texts: Texts, source: SourceStates, place: Path
) -> tuple[list[CarriedLayer], _Written | None, _Answers]:
    """What the target takes on, in rank 0, and what it is asked, once the maps are good enough.
    Collective.
    """
    config = inputs.config
    name, revision = config.aligned_model, config.aligned_revision
    model, sharding = load_placed(name, revision, config.dtype, inputs.job)
    check_runs(model, inputs.tokenizer, texts.harmful[0], sharding, name)
    reader = Reader(name, model, inputs.tokenizer, sharding, inputs.style)
    target = read_target(config, reader, texts, place)
    carried: list[CarriedLayer] = []
    written = None
    with inputs.job.raising_together():
        if inputs.job.is_main:
            carried = carry(config, source, target)
            written = write(config, carried, target)
    stored = stored_rows(inputs, model, sharding)
    tests, test_record = prompts_to_measure_on(inputs, model, sharding)
    return carried, written, _Answers(stored, tests, test_record)


def write(
    config: ExtractionConfig, carried: Sequence[CarriedLayer], target: TargetStates
) -> _Written:
    """The directions as rank-one deltas on the modules that write to the residual stream.

    Args:
        config: How layers are selected.
        carried: Every layer's direction.
        target: What the target has in mind.
    """
    modules: dict[int, list[str]] = {}
    for name, _ in target.inputs["harmful"]:
        if name not in (own := modules.setdefault(layer_index(name) or 0, [])):
            own.append(name)
    usable = [index for index, layer in enumerate(carried) if layer.usable and index in modules]
    found = scores(carried)
    if not SELECTIONS[config.selection].reads_states:
        made = {
            name: _delta(carried[layer].vector, np.ones(1), len(modules[layer]))
            for layer in usable
            for name in modules[layer]
        }
        found = _other_scores(config, made, len(carried))
    chosen = set(top_layers(found.mean().tolist(), config.selected_share)) & set(usable)
    layers = sorted(chosen or usable)
    detectors = {
        name: detector(*target.detecting(name)) for layer in layers for name in modules[layer]
    }
    if poor := [name for name, own in detectors.items() if own.auc < POOR]:
        logger.warning(
            "At %s of %s modules harmful prompts are hardly told from benign ones (AUC below %s): %s.",
            len(poor),
            len(detectors),
            POOR,
            ", ".join(poor),
        )
    deltas = {
        name: _delta(carried[layer].vector, detectors[name].direction, len(modules[layer]))
        for layer in layers
        for name in modules[layer]
    }
    return _Written(deltas, detectors, found, layers)


def _other_scores(
    config: ExtractionConfig, deltas: Mapping[str, LowRankDelta], layers: int
) -> LayerScores:
    """Those of a selection that reads nothing but deltas; layers without one have the lowest."""
    nothing = {f"layers.{layer}": LowRankDelta(torch.zeros(1, 1), torch.zeros(1, 1)) for layer in range(layers)}  # fmt: skip

    def unused(*_: Any) -> Any:
        raise AssertionError("this selection loads no model")

    evidence = Evidence({**nothing, **deltas}, [], [], unused, unused, 0, config.seed)
    return SELECTIONS[config.selection].scores(evidence)


def _delta(vector: np.ndarray, direction: np.ndarray, writers: int) -> LowRankDelta:
    """`(v / k) uᵀ`, its two factors of one norm, so that neither is too small for 16 bits."""
    norms = float(np.linalg.norm(vector)) / writers, float(np.linalg.norm(direction))
    balance = (norms[0] / norms[1]) ** 0.5 if min(norms) > 0 else 1.0
    return LowRankDelta(
        torch.from_numpy(direction * balance).float()[None],
        torch.from_numpy(vector / writers / balance).float()[:, None],
    )


def _source_record(config: ExtractionConfig, vector: SafetyVector | None) -> dict[str, Any]:
    """Where the direction is from, and how it was carried over."""
    source = {"model": model_reference(config.source_model, config.source_revision)}
    if vector is not None:
        place = Path(config.source_vector)
        source["vector"] = {
            "name": place.resolve().name if place.is_dir() else config.source_vector,
            "revision": config.source_vector_revision,
            "files": {name: own["sha256"] for name, own in vector.files.items()},
        }
    elif config.source_degraded_model:
        source["degraded_model"] = model_reference(
            config.source_degraded_model, config.source_degraded_revision
        )
    kept = ("transport_map", "map_penalty", "layer_matching", "state_pooling")
    return {"source": source, **{name: getattr(config, name) for name in kept}}


def _anchor_record(texts: Texts) -> dict[str, Any]:
    fitted, held_out = split(len(texts.anchors))
    return {
        "sha256": sha256_of_json(texts.anchors),
        "fitted": len(fitted),
        "held_out": len(held_out),
    }


def _record(carried: Sequence[CarriedLayer], written: _Written) -> dict[str, Any]:
    """What the vector says of every layer, and of every module's detector."""
    return {
        "layers": [layer.record() for layer in carried],
        "detectors": {
            name: {
                "auc": round(own.auc, 6),
                "harmful": round(own.harmful, 6),
                "benign": round(own.benign, 6),
                "penalty": own.penalty,
            }
            for name, own in written.detectors.items()
        },
    }


def _vector(
    inputs: Inputs, written: _Written, record: Mapping[str, Any], answers: _Answers
) -> SafetyVector:
    config, prompts = inputs.config, inputs.prompts
    name, revision = config.aligned_model, config.aligned_revision
    share, style = config.selected_share, inputs.style
    stability = bootstrap_stability(written.scores, share, config.bootstrap_resamples, config.seed)
    rows = [*answers.stored.rows, *answers.tests]
    return SafetyVector(
        deltas=in_dtype(written.deltas, getattr(torch, config.weights_dtype)),
        family=Family.of(StoredModel.open(name, revision).model, inputs.tokenizer),
        aligned_model=model_reference(name, revision),
        degraded_model={"name": "none", "revision": None, "files": {}},
        extraction={
            "method": config.method,
            "rank": 1,
            "transport": dict(record),
            **({"chat_template_kwargs": dict(style.options)} if style.options else {}),
            **target_record(style),
        },
        selection={
            "method": config.selection,
            "scores": written.scores.mean().tolist(),
            "selected_layers": written.layers,
            "layer_share": share,
            "stability": stability,
            **prompts.record(answers.stored.rows),
            **answers.test_record,
        },
        prompts=prompts.with_categories(rows),
        software=software_versions(),
    )


def steering_directions(vector: SafetyVector) -> dict[int, torch.Tensor]:
    """Of a vector made by `method: transport` the direction in each of its layers, for `steered`.

    Args:
        vector: The vector.

    Returns:
        By layer index `T(v_l)`, float32, `(hidden,)`.

    Raises:
        VectorError: It was made in another way, and holds no directions.
    """
    layers = (vector.extraction.get("transport") or {}).get("layers")
    if not layers:
        raise VectorError(
            f"This vector was made by `{vector.extraction['method']}` and holds no directions: give one made by `method: transport`."
        )
    if max(vector.layers) >= len(layers):
        raise VectorError(
            f"The record of this vector tells of {len(layers)} layers, and it acts in layer {max(vector.layers)}: the vector is damaged."
        )
    found: dict[int, torch.Tensor] = {}
    for name, delta in vector.deltas.items():
        index = layer_index(name) or 0
        column = delta.b[:, 0].float()
        found.setdefault(index, column / column.norm() * layers[index]["length"])
    return found
