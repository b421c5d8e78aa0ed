"""What the safety step takes, at the end of a training or by `safegene apply`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..checkpoints.adapter_output import save_adapter
from ..checkpoints.checkpoint_folder import CheckpointFolder
from ..checkpoints.live_merge import save_merged
from ..checkpoints.merge_terms import ScaledVector
from ..config.settings import SafeGeneConfig
from ..data.calibration import CalibrationSet
from ..data.shots import Shots
from ..distributed.memory import free_bytes
from ..models.batch_size import ON_CPU
from ..models.data_types import WrittenTypes
from ..models.factors import Factors, allowed_of, describe_place
from ..models.trained_deltas import TrainedDeltas, plain_modules
from ..recalibration.objective import Objective, Passes, term_weights
from ..recalibration.touch_up import EVERY, RANK, STEPS, drawn
from ..step.repair import BOTH
from ..vectors.safety_vector import SafetyVector
from .cost import BYTES_OF_A_NUMBER, Cost, Launch
from .planned_run import PlannedRun, slightly
from .probe import Measured, Probe


def estimate_safeguard(
    probe: Probe,
    config: SafeGeneConfig,
    vector: SafetyVector,
    tokenizer: PreTrainedTokenizerBase,
    shots: Shots,
    launch: Launch,
) -> dict[str, Cost]:
    """Costs of `recalibrate`, `touch_up` (where it may be tried; it is not where the vector alone
    is enough), `measure` (unless it is off) and `save` at the end of a training, or by `safegene
    apply`.

    What the training itself holds, its optimiser's states above all, is not in the memory;
    communication between ranks and a search that ends early are not in the seconds.
    """
    stored = sum(
        t.numel() * t.element_size() for delta in vector.deltas.values() for t in (delta.a, delta.b)
    )
    deltas = probe.deltas(vector.deltas, vector.rank)
    run = PlannedRun.of(probe, tokenizer, launch, deltas, stored)
    passes, lowest = _Passes(run, config, shots), min(vector.layers)
    search = _recalibration(run, config, passes, lowest)
    costs = {"recalibrate": replace(search, factors=_place_of_factors(run, vector))}
    touches_up = config.search.repair == BOTH
    if touches_up:
        costs["touch_up"] = _touch_up(run, vector, passes, lowest)
    # of all kinds together, as they are measured
    prompts = [list(prompt.messages) for kind in shots.unseen.prompts.values() for prompt in kind]
    if prompts:
        size = config.batch_size or ON_CPU
        reasoning = shots.unseen.answering.max_reasoning_tokens
        new_tokens = config.measure.max_new_tokens + reasoning
        seconds, memory = run.answers([prompts], new_tokens, size, True)
        costs["measure"] = run.cost((3 if touches_up else 2) * seconds, memory)
    return costs | {"save": _saving(run, config)}


class _Passes:
    """The passes of a search for the coefficients, one of each, and a step of a touch-up.

    Attributes:
        sides: By the probe's model, the objective that is fitted on and the held-out one; there
            after `references`.
        step: By the probe's model, the objective of one of a touch-up's steps; there after
            `touch_up`.
    """

    def __init__(self, run: PlannedRun, config: SafeGeneConfig, shots: Shots):
        self._run, self._config, self._shots = run, config, shots
        self._attachments = [run.attachment(index) for index in (0, 1)]
        self.sides: dict[int, tuple[Objective, Objective]] = {}
        self.step: dict[int, Objective] = {}
        self._trained: dict[int, TrainedDeltas] = {}
        for model in run.probe.models:
            for parameter in model.parameters():
                parameter.requires_grad_(False)

    def references(self, index: int) -> None:
        fit, other = (
            self._objective(self._shots.data, name, index) for name in ("fit", "held_out")
        )
        self.sides[index] = fit, other

    def _objective(self, data: CalibrationSet, side: str, index: int) -> Objective:
        probe = self._run.probe
        passes = Passes(self._run.padding_id, self._config.batch_size or ON_CPU)
        return Objective(probe.models[index], data, side, self._config, passes, probe.alone)

    def factors(self, index: int) -> None:
        """Those of a touch-up, beside what is measured."""
        run, generator = self._run, torch.Generator().manual_seed(0)
        self._trained[index] = TrainedDeltas(
            run.probe.models[index], run.deltas[index], RANK, generator, run.probe.alone.device
        )

    def touch_up(self, index: int) -> None:
        """One step's reference and gradient."""
        few = drawn(self._shots.data, torch.Generator().manual_seed(self._config.seed))
        self.step[index] = self._objective(few, "fit", index)
        model, trained = self._run.probe.models[index], self._trained[index]
        with slightly(self._attachments[index]), trained.applied():
            self.step[index].gradient_by(model, trained.parameters, term_weights(self._config))

    def gradients(self, index: int) -> None:
        attachment = self._attachments[index]
        point = np.full(len(attachment.space.names), 0.1)
        model = self._run.probe.models[index]
        self.sides[index][0].gradients(model, attachment.applied, point)

    def losses(self, which: int, index: int) -> None:
        with slightly(self._attachments[index]):
            self.sides[index][which].losses(self._run.probe.models[index])


def _recalibration(run: PlannedRun, config: SafeGeneConfig, passes: _Passes, lowest: int) -> Cost:
    """The search, for a vector whose lowest layer is `lowest`."""
    probe, launch = run.probe, run.launch
    reference = probe.measure(passes.references)
    fit = probe.measure(passes.gradients)
    forward, other = (probe.measure(partial(passes.losses, which)) for which in (0, 1))
    fit_seconds, fit_memory = _of_a_fit(fit, forward, probe.layers, lowest)
    jobs = [len(side.jobs) for side in passes.sides[1]]
    reference_seconds, reference_memory = reference.at(probe.layers)
    seconds = reference_seconds * launch.share(sum(jobs))
    seconds += config.search.max_evaluations * fit_seconds * launch.share(jobs[0])
    seconds += 2 * other.at(probe.layers)[0] * launch.share(jobs[1])
    references = sum(t.nbytes for side in passes.sides[1] for t in side.reference.values())
    kept = run.kept_beside(references)
    return run.cost(seconds, max(reference_memory, kept + fit_memory))


def _touch_up(run: PlannedRun, vector: SafetyVector, passes: _Passes, lowest: int) -> Cost:
    """All steps of a touch-up, and the held-out shots as often as they are looked at: at the start,
    every few steps, and three times with the weights that are shipped.
    """
    probe, launch = run.probe, run.launch
    for index in (0, 1):
        passes.factors(index)
    step = probe.measure(passes.touch_up)
    forward, other = (probe.measure(partial(passes.losses, which)) for which in (0, 1))
    seconds, memory = _of_a_fit(step, forward, probe.layers, lowest)
    jobs = (len(passes.step[1].jobs), len(passes.sides[1][1].jobs))
    looks = 1 + STEPS // EVERY + 3
    total = STEPS * seconds * launch.share(jobs[0])
    total += looks * other.at(probe.layers)[0] * launch.share(jobs[1])
    numbers = sum(
        RANK * (vector.deltas[name].a.shape[1] + vector.deltas[name].b.shape[0])
        for name in plain_modules(vector.deltas)
    )
    references = sum(tensor.nbytes for tensor in passes.sides[1][1].reference.values())
    held = BYTES_OF_A_NUMBER * numbers + run.kept_beside(references)
    return run.cost(total, held + memory)


def _place_of_factors(run: PlannedRun, vector: SafetyVector) -> dict[str, Any]:
    """Where the factors will lie, of what is free now once the model's weights are there too."""
    probe = run.probe
    weights = run.launch.held(probe.weights, probe.dtype.itemsize)
    allowed = allowed_of(free_bytes(probe.alone.device) - weights)
    return describe_place(Factors(vector.deltas).num_bytes(probe.dtype), allowed)


def _of_a_fit(fit: Measured, forward: Measured, layers: int, lowest: int) -> tuple[float, int]:
    """Seconds and transient bytes of one pass with gradients.

    Below the vector's lowest layer there is no backward pass, and nothing is kept for one.
    """
    seconds, memory = fit.at(layers - lowest)
    return seconds + forward.at(1 + lowest)[0] - forward.at(1)[0], memory


def _saving(run: PlannedRun, config: SafeGeneConfig) -> Cost:
    probe, tokenizer, output = run.probe, run.tokenizer, config.output

    def write(index: int, folder: Path) -> None:
        model, own = probe.models[index], run.deltas[index]
        vector = ScaledVector(own, dict.fromkeys(own, 0.1))
        if output.output_format != "adapter":
            checkpoint = CheckpointFolder(folder, tokenizer, output.max_shard_size)
            types = WrittenTypes.of_model(model, output.dtype)
            save_merged(model, vector, checkpoint, probe.alone, types)
        if output.output_format != "merged":
            save_adapter(model, vector, "", tokenizer, folder / "adapter", probe.alone)

    return run.cost(*probe.measure_writing(write, output.output_dir))
