"""What `safegene extract` with `method: transport` takes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..checkpoints.scratch import scratch_folder
from ..extraction.config import ExtractionConfig
from ..extraction.prompts import ExtractionPrompts
from ..extraction.transport.detectors import ANCHORS, detector
from ..extraction.transport.maps import MAPS, Fit, split
from ..extraction.transport.sides import Texts
from ..extraction.transport.states import POOLINGS, Reader, Rows, record
from ..models.batch_size import ON_CPU
from ..models.parameters import base_model, linear_shape
from ..models.reasoning import AS_TEMPLATE
from ..models.residual import decoder_layers, residual_writers
from .cost import Cost, Launch
from .extraction import answers_cost, samples_to_answer
from .planned_run import PlannedRun
from .probe import Probe


_FLOAT = 4  # bytes of a number on disk


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    probe: Probe
    tokenizer: PreTrainedTokenizerBase

    @property
    def width(self) -> int:
        """Numbers of a hidden state."""
        found: int = base_model(self.probe.models[0]).config.get_text_config().hidden_size
        return found

    def inputs(self) -> list[int]:
        """Width of the input of every module of a layer that writes to the residual stream."""
        writers = residual_writers(self.probe.models[0]).values()
        return [(linear_shape(module) or (0, 0))[1] for module in writers]


def estimate_transport(
    source: Side,
    target: Side,
    config: ExtractionConfig,
    prompts: ExtractionPrompts,
    texts: Texts,
    launch: Launch,
) -> dict[str, Cost]:
    """Costs of the steps of a transport. Every process reads all texts, so that several are no
    faster at it.

    Args:
        source: The model that the direction is carried from.
        target: The one that gets a vector.
        config: How.
        prompts: Those that the target is asked.
        texts: What both models read.
        launch: How it will be launched.
    """
    run = PlannedRun.of(target.probe, target.tokenizer, launch, [{}, {}])
    own = PlannedRun.of(source.probe, source.tokenizer, launch, [{}, {}])
    asked = [*texts.harmful, *texts.benign]
    samples = samples_to_answer(target.tokenizer, asked, config.max_new_tokens)
    layers = target.probe.layers
    size = layers * sum(target.width + width for width in target.inputs())
    twice = 2 if config.source_vector or config.source_degraded_model else 1
    return {
        "source": _states(own, source, texts, twice, False),
        "target": _states(run, target, texts, 1, True),
        "maps": _maps(run, source, target, config, texts),
        "answers": answers_cost(run, config, prompts, samples),
        "save": Cost(0.0, target.probe.host, size * 2),
    }


def _states(run: PlannedRun, side: Side, texts: Texts, twice: int, detects: bool) -> Cost:
    """Passes over all texts, from those over a batch of anchors."""
    probe, few = side.probe, texts.anchors[:ON_CPU]

    def passes(index: int) -> None:
        model = probe.models[index]
        reader = Reader("", model, side.tokenizer, probe.alone, AS_TEMPLATE)
        layers = {str(number): layer for number, layer in decoder_layers(model).items()}
        writers = residual_writers(model) if detects else {}
        with scratch_folder("an estimate") as place:
            record(reader, few, Path(place), layers, writers, "last", len(few))

    seconds, memory = probe.measure(passes).at(probe.layers)
    number = len(texts.harmful) + len(texts.benign)
    read = len(texts.anchors) + twice * number
    disk = read * probe.layers * side.width
    if detects:
        detecting = number + min(ANCHORS, len(texts.anchors))
        disk += detecting * probe.layers * sum(side.inputs()) * len(POOLINGS)
    return run.cost(seconds * read / len(few), memory, disk * _FLOAT)


def _maps(
    run: PlannedRun, source: Side, target: Side, config: ExtractionConfig, texts: Texts
) -> Cost:
    """One map and the detectors of one layer, on random numbers, times the number of layers."""
    draw = np.random.default_rng(0)
    rows = len(texts.harmful) + 2 * len(texts.benign) + 2 * min(ANCHORS, len(texts.anchors))

    def one_map() -> None:
        with scratch_folder("an estimate") as place:
            sides = [Rows(Path(place) / str(side.width), len(texts.anchors), side.width) for side in (source, target)]  # fmt: skip
            for side in sides:
                side.open("w+")[:] = draw.standard_normal((side.count, side.width))
            fitted = split(len(texts.anchors))[0]
            MAPS[config.transport_map](
                Fit(sides[0], sides[1], fitted, config.map_penalty or 1.0, 0)
            )

    def detectors() -> None:
        for width in target.inputs():
            inputs = draw.standard_normal((rows, width))
            first, second = len(texts.harmful), len(texts.harmful) + len(texts.benign)
            detector(inputs[:first], inputs[first:second], [inputs[second:]])

    probe = target.probe

    def seconds(work: Callable[[], None]) -> float:
        return probe.measure(lambda _: work()).at(1)[0]

    kept = config.selected_share * seconds(detectors)
    held = rows * max(target.inputs()) * 8 + 3 * rows**2 * 8
    return run.cost(probe.layers * (seconds(one_map) + kept), held)
