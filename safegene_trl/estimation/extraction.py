"""What `safegene extract` takes."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoints.stored_model import StoredModel
from ..config.measure import MeasureConfig
from ..extraction.aligned_rows import REFUSAL_TOKENS
from ..extraction.by_category import CategoryPrompts
from ..extraction.config import ExtractionConfig
from ..extraction.delta import adapter_delta, stored_delta
from ..extraction.distillation import (
    ReferenceBatch,
    expansion,
    mean_divergence,
    reference_batches,
    with_factors,
)
from ..extraction.methods import METHODS
from ..extraction.prompts import ExtractionPrompts
from ..extraction.selection import SELECTIONS, gradient, last_token_states, top_layers
from ..extraction.soft_targets import soft_targets
from ..models.batch_size import ON_CPU
from ..models.experts import can_be_changed, matrix_shapes, task_matrices
from ..models.inputs import Sample, shortened
from ..models.names import shared_parameter
from ..models.parameters import text_modules
from ..vectors.prompt_rows import part_of, rows_of
from ..vectors.record import VectorRecord
from .cost import Cost, Launch
from .planned_run import PlannedRun
from .probe import LAYERS, Probe, temporary_folder_beside


SAMPLED_PROMPTS = 2  # of steps that read prompts one by one


@dataclass(frozen=True)
class DifferingModules:
    """In what an aligned and a degraded model differ.

    Attributes:
        names: Those of the modules in which they do.
        rank: The vector's rank.
        by_adapters: Whether it is by LoRAs only, so that no weight has to be read.
    """

    names: list[str]
    rank: int
    by_adapters: bool

    @classmethod
    def between(
        cls,
        aligned: StoredModel,
        degraded: StoredModel,
        by_adapters: bool,
        rank: int | None,
        experts: bool = True,
    ) -> "DifferingModules":
        """That of two checkpoints, at a rank: where none is given, the LoRAs' own, else 8; with or
        without experts that lie in one parameter.
        """
        own: dict[str, int] = {}
        for stored in (aligned, degraded):
            for name, pairs in task_matrices(stored.model).items():
                own[name] = own.get(name, 0) + sum(a.shape[0] for a, _ in pairs)
        ranks = list(own.values())
        names = [
            name
            for name in matrix_shapes(text_modules(degraded.model))
            if can_be_changed(name)
            and (experts or not shared_parameter(name))
            and (name in own or not by_adapters)
        ]
        return cls(names, rank or (max(ranks) if by_adapters and ranks else 8), by_adapters)


def estimate_extraction(
    probe: Probe,
    config: ExtractionConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: ExtractionPrompts,
    difference: DifferingModules,
    launch: Launch,
) -> dict[str, Cost]:
    """Costs of the steps of `safegene extract`.

    Args:
        probe: Of the degraded model, with its LoRA if it has one.
        config: How the vector is made.
        tokenizer: The aligned model's.
        prompts: Those that it is given.
        difference: In what the two models differ.
        launch: How it will be launched.
    """
    by_category = prompts.by_category()
    deltas = probe.deltas(difference.names, difference.rank)
    run = PlannedRun.of(probe, tokenizer, launch, deltas)
    costs = {"difference": _difference(probe, config, difference)}
    samples = [
        samples_to_answer(tokenizer, texts, config.max_new_tokens) for texts in prompts.to_answer()
    ]
    costs["answers"] = answers_cost(
        run, config, prompts, [each for kind in samples for each in kind]
    )
    if METHODS[config.method].distils:
        costs["distillation"] = _distillation(run, config, samples)
    if SELECTIONS[config.selection].runs_models:
        costs["selection"] = _selection(run, config, prompts, samples[0])
    costs |= _categories(run, by_category)
    return costs | {"save": Cost(0.0, probe.host, _size_of_vector(run, config))}


def estimate_retargeting(
    probe: Probe,
    config: ExtractionConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: ExtractionPrompts,
    vector: VectorRecord,
    launch: Launch,
) -> dict[str, Cost]:
    """Costs of the steps of `safegene extract` with `vector`.

    Args:
        probe: Of the aligned model.
        config: How the prompts are made.
        tokenizer: The aligned model's.
        prompts: Those that are added.
        vector: The vector whose weights are kept.
        launch: How it will be launched.
    """
    learned = rows_of(vector.prompts, "harmful", "benign", "border")
    by_category = prompts.by_category(learned)
    size = sum(file["bytes"] for file in vector.files.values())
    run = PlannedRun.of(probe, tokenizer, launch, [{}, {}], size)
    stored = [row for row in vector.prompts if part_of(row) != "measure" and "targets" not in row]
    texts = [row["prompt"] for row in stored]
    texts += [text for own in prompts.to_answer() for text in own]
    samples = samples_to_answer(tokenizer, texts, config.max_new_tokens)
    return {
        "answers": answers_cost(run, config, prompts, samples),
        **_categories(run, by_category),
        "save": Cost(0.0, probe.host, size),
    }


def answers_cost(
    run: PlannedRun,
    config: ExtractionConfig,
    prompts: ExtractionPrompts,
    samples: Sequence[Sample],
) -> Cost:
    """The aligned model's answers, those to prompts that are measured on, and what it says to the
    beginnings of `samples`.
    """

    def turns(kinds: Iterable[Sequence[str]]) -> list[list[list[dict[str, str]]]]:
        return [[[{"role": "user", "content": text}] for text in texts] for texts in kinds]

    reasoning = config.answering(run.tokenizer).max_reasoning_tokens
    asked = [(turns(prompts.to_answer()), config.max_new_tokens + reasoning)]
    if prompts.tests:
        most = MeasureConfig.max_new_tokens
        most += config.measuring(run.tokenizer).max_reasoning_tokens
        asked.append((turns(prompts.tests.values()), most))
    found = [
        run.answers(kinds, most, config.samples_per_step, False)
        for kinds, most in asked
        if any(kinds)
    ]
    if samples:
        found.append(_soft_targets(run, samples))
    return run.cost(sum(seconds for seconds, _ in found), max(peak for _, peak in found))


def _difference(probe: Probe, config: ExtractionConfig, difference: DifferingModules) -> Cost:
    rank = difference.rank
    if difference.by_adapters:
        plain = nn.Module()

        def known(index: int) -> None:
            adapter_delta(plain, probe.models[index], rank)

        seconds, memory = probe.measure(known, on_host=True).at(probe.layers)
        return Cost(seconds, probe.host + memory)
    with temporary_folder_beside(config.output_dir) as place:
        stored, others = (probe.stored(place / name) for name in ("aligned", "degraded"))

        def read(index: int) -> None:
            stored_delta(stored[index], others[index], rank, config.exact_svd, config.seed, False)

        cost = probe.measure(read, on_host=True)
    seconds, memory = cost.at(probe.layers)
    return Cost(seconds, probe.host + memory)


def _soft_targets(run: PlannedRun, samples: Sequence[Sample]) -> tuple[float, int]:
    """Seconds and transient bytes of what the aligned model says to the beginnings of its answers."""
    cut = [short for each in samples if (short := shortened(each, None, REFUSAL_TOKENS))]
    probe, few = run.probe, cut[:ON_CPU]

    def passes(index: int) -> None:
        soft_targets(probe.models[index], few, run.padding_id, probe.alone, len(few))

    seconds, memory = probe.measure(passes).at(probe.layers)
    share = run.launch.share(math.ceil(len(cut) / len(few)))
    return seconds * len(cut) / len(few) * share, memory


class _Student:
    """One step of distillation on a batch of each kind, and what it takes its references from."""

    def __init__(
        self, run: PlannedRun, config: ExtractionConfig, firsts: Sequence[Sequence[Sample]]
    ):
        self._run, self._blocks, self._firsts = run, config.expanded_blocks, firsts
        self.items: dict[int, list[ReferenceBatch]] = {}
        self._students: list[PeftModel] = []

    def references(self, index: int) -> None:
        probe, pad = self._run.probe, self._run.padding_id
        self.items[index] = [
            item
            for anchor, batch in enumerate(self._firsts)
            if batch
            for item in reference_batches(
                probe.models[index], batch, len(batch), pad, bool(anchor), probe.alone
            )
        ]

    def put_on_factors(self) -> None:
        self._students = [
            with_factors(copy.deepcopy(model), own)
            for model, own in zip(self._run.probe.models, self._run.deltas, strict=True)
        ]

    def steps(self, index: int) -> None:
        student = self._students[index]
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        with expansion(student, self._blocks):
            for item in self.items[index]:
                torch.autograd.grad(mean_divergence(student, item), trained)

    def losses(self, index: int) -> None:
        with torch.no_grad(), expansion(self._students[index], self._blocks):
            for item in self.items[index]:
                mean_divergence(self._students[index], item)


def _distillation(
    run: PlannedRun, config: ExtractionConfig, samples: Sequence[Sequence[Sample]]
) -> Cost:
    """References of one batch of each kind, one step on each and its divergence at both ends, times
    their number.
    """
    probe = run.probe
    counts = [math.ceil(len(kind) / config.samples_per_step) for kind in samples]
    student = _Student(run, config, [kind[: config.samples_per_step] for kind in samples])
    reference = probe.measure(student.references)
    student.put_on_factors()
    step, loss = probe.measure(student.steps), probe.measure(student.losses)
    kinds = sum(count > 0 for count in counts)
    batches = sum(counts) / kinds  # of every kind one
    share = run.launch.share(sum(counts))
    seconds = reference.at(probe.layers)[0] * batches * share
    seconds += step.at(probe.layers)[0] * config.distill_steps / kinds
    seconds += 2 * loss.at(probe.layers)[0] * batches * share
    kept = run.kept_beside(int(sum(item.log_probs.nbytes for item in student.items[1]) * batches))
    peak = max(step.at(probe.layers)[1], reference.at(probe.layers)[1])
    return run.cost(seconds, kept + peak)


def _selection(
    run: PlannedRun,
    config: ExtractionConfig,
    prompts: ExtractionPrompts,
    refusals: Sequence[Sample],
) -> Cost:
    """Scores of the layers on a few prompts, times their number."""
    probe, most = run.probe, config.num_selection_prompts

    def contrast(index: int) -> None:
        texts = prompts.harmful[:SAMPLED_PROMPTS]
        last_token_states(probe.models[index], run.tokenizer, texts, probe.alone)

    def gradients(index: int) -> None:
        few = refusals[:SAMPLED_PROMPTS]
        gradient(probe.models[index], run.deltas[index], few, run.padding_id, probe.alone)

    if SELECTIONS[config.selection].takes_gradients:
        scores, passes = gradients, min(most, len(refusals))
    else:
        scores = contrast
        passes = 2 * sum(min(most, len(texts)) for texts in (prompts.harmful, prompts.benign))
    seconds, memory = probe.measure(scores).at(probe.layers)
    return run.cost(seconds * passes / SAMPLED_PROMPTS, memory)


def _categories(run: PlannedRun, prompts: CategoryPrompts | None) -> dict[str, Cost]:
    """The passes that tell a vector's categories, on a few prompts, times their number; nothing for a
    vector that is not by category.
    """
    if prompts is None:
        return {}
    probe, texts = run.probe, prompts.texts

    def passes(index: int) -> None:
        last_token_states(probe.models[index], run.tokenizer, texts[:SAMPLED_PROMPTS], probe.alone)

    seconds, memory = probe.measure(passes).at(probe.layers)
    return {"categories": run.cost(seconds * len(texts) / SAMPLED_PROMPTS, memory)}


def _size_of_vector(run: PlannedRun, config: ExtractionConfig) -> int:
    """Bytes of the selected layers' factors."""
    numbers = sum(t.numel() for delta in run.deltas[0].values() for t in (delta.a, delta.b))
    kept = len(top_layers(range(run.probe.layers), config.selected_share))
    return numbers // LAYERS[0] * kept * getattr(torch, config.weights_dtype).itemsize


def samples_to_answer(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], response_tokens: int
) -> list[Sample]:
    """Prompts with answers as long as they may become."""
    found = []
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        filler = [ids[-1] if ids else 0] * response_tokens
        found.append(Sample(ids + filler, [False] * len(ids) + [True] * response_tokens))
    return found
