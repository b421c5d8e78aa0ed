"""What the safety step takes, at the end of a training or by `safegene apply`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..checkpoints.adapter_output import save_adapter
from ..checkpoints.checkpoint_folder import CheckpointFolder
from ..checkpoints.live_merge import save_merged
from ..checkpoints.merge_terms import ScaledVector
from ..config.settings import SafeGeneConfig
from ..data.shots import Shots
from ..distributed.memory import free_bytes
from ..models.batch_size import ON_CPU
from ..models.data_types import WrittenTypes
from ..models.factors import Factors, allowed_of, describe_place
from ..recalibration.objective import Objective, Passes
from ..vectors.safety_vector import SafetyVector
from .cost import Cost, Launch
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
    """Costs of `recalibrate`, `measure` (unless it is off) and `save` at the end of a training, or
    by `safegene apply`.

    What the training itself holds, its optimiser's states above all, is not in the memory;
    communication between ranks and a search that ends early are not in the seconds.
    """
    stored = sum(
        t.numel() * t.element_size() for delta in vector.deltas.values() for t in (delta.a, delta.b)
    )
    deltas = probe.deltas(vector.deltas, vector.rank)
    run = PlannedRun.of(probe, tokenizer, launch, deltas, stored)
    search = _recalibration(run, config, shots, min(vector.layers))
    costs = {"recalibrate": replace(search, factors=_place_of_factors(run, vector))}
    # of all kinds together, as they are measured
    prompts = [list(prompt.messages) for kind in shots.unseen.prompts.values() for prompt in kind]
    if prompts:
        size = config.batch_size or ON_CPU
        reasoning = shots.unseen.answering.max_reasoning_tokens
        new_tokens = config.measure.max_new_tokens + reasoning
        seconds, memory = run.answers([prompts], new_tokens, size, True)
        costs["measure"] = run.cost(2 * seconds, memory)
    return costs | {"save": _saving(run, config)}


class _Passes:
    """The passes of a search for the coefficients, one of each.

    Attributes:
        sides: By the probe's model, the objective that is fitted on and the held-out one; there
            after `references`.
    """

    def __init__(self, run: PlannedRun, config: SafeGeneConfig, shots: Shots):
        self._run, self._config, self._shots = run, config, shots
        self._attachments = [run.attachment(index) for index in (0, 1)]
        self.sides: dict[int, tuple[Objective, Objective]] = {}
        for model in run.probe.models:
            for parameter in model.parameters():
                parameter.requires_grad_(False)

    def references(self, index: int) -> None:
        probe = self._run.probe
        passes = Passes(self._run.padding_id, self._config.batch_size or ON_CPU)
        fit, other = (
            Objective(
                probe.models[index], self._shots.data, name, self._config, passes, probe.alone
            )
            for name in ("fit", "held_out")
        )
        self.sides[index] = fit, other

    def gradients(self, index: int) -> None:
        attachment = self._attachments[index]
        point = np.full(len(attachment.space.names), 0.1)
        model = self._run.probe.models[index]
        self.sides[index][0].gradients(model, attachment.applied, point)

    def losses(self, which: int, index: int) -> None:
        with slightly(self._attachments[index]):
            self.sides[index][which].losses(self._run.probe.models[index])


def _recalibration(run: PlannedRun, config: SafeGeneConfig, shots: Shots, lowest: int) -> Cost:
    """The search, for a vector whose lowest layer is `lowest`."""
    probe, launch, passes = run.probe, run.launch, _Passes(run, config, shots)
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
