"""What a command will take, told before anything of it runs: seconds, peak memory and disk of each
of its steps.

Every step is run for real on this machine, on models of the same architecture with random weights
and only one and three layers. What a step takes is linear in the number of layers,

    T(L) = T(1) + (L − 1) · (T(3) − T(1)) / 2,

in seconds and in bytes; the prompts, batches and ranks of the real run are counted, so that no
speed has to be known. To be believed it must run on the kind of machine that the command will run
on. Bytes are those that tensors hold: on a CPU the C library's allocator may keep up to about as
much again of what was freed.
"""

import copy
import math
import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..checkpoints.live_merge import save_adapter, save_merged
from ..checkpoints.output import atomic_directory, nearest_folder
from ..checkpoints.stored_merge import StoredModel, write_merged
from ..config.settings import SafeGeneConfig
from ..data.shots import Shots
from ..distributed.layouts import Sharding
from ..extraction.config import ExtractionConfig
from ..extraction.delta import adapter_delta, stored_delta
from ..extraction.distillation import expansion, mean_divergence, reference_batches, with_factors
from ..extraction.selection import gradient, last_token_states, top_layers
from ..models.attachment import VectorAttachment
from ..models.batch_size import ON_CPU
from ..models.coefficients import CoefficientSpace
from ..models.generation import generate_answers
from ..models.inputs import Sample, padding_id
from ..models.low_rank import LowRankDelta
from ..models.parameters import canonical_modules, canonical_parameters, linear_shape
from ..recalibration.objective import Objective, Passes
from ..vectors.safety_vector import SafetyVector


LAYERS = (1, 3)
REPETITIONS = 3  # the fastest counts: other work on the machine only adds
SAMPLED_PROMPTS = 2  # of steps that read prompts one by one
# elements that DeepSpeed keeps gathered by default (`stage3_max_live_parameters`)
ZERO3_GATHERED = 10**9


@dataclass(frozen=True)
class Cost:
    """What one step takes.

    Attributes:
        seconds: Wall-clock time.
        memory: Peak of one process, in bytes: of steps that need the whole model on the accelerator
            where there is one, else resident.
        disk: Bytes written.
    """

    seconds: float
    memory: int
    disk: int = 0


@dataclass(frozen=True)
class Launch:
    """How the command will be launched: processes, and whether they share out the weights (ZeRO-3,
    FSDP2).
    """

    processes: int = 1
    sharded: bool = False

    def share(self, items: int) -> float:
        """Share (0–1] of `items` that the busiest process works on."""
        return math.ceil(items / self.processes) / items if items else 1.0

    def held(self, weights: int, itemsize: int) -> int:
        """Bytes of a model's weights that a process holds while it computes."""
        if not self.sharded:
            return weights
        return min(weights, weights // self.processes + ZERO3_GATHERED * itemsize)


@dataclass(frozen=True)
class _Pair:
    """Seconds and transient bytes of one step on models of two depths."""

    seconds: tuple[float, float]
    memory: tuple[int, int]

    def at(self, layers: float) -> tuple[float, int]:
        """Extrapolated to a number of layers."""
        (fast, slow), (small, large) = self.seconds, self.memory
        more = (layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
        return fast + more * max(0.0, slow - fast), int(small + more * max(0, large - small))


class Probe:
    """The real model's architecture with few layers, twice.

    Args:
        skeleton: The real model without weights, from `load_skeleton`: its config counts.
        dtype: Name of the data type that the weights will have.
        adapter: The LoRA that the training will put on. A skeleton with a LoRA brings its own.
        checkpointing: Whether layers are recomputed in the backward pass.
        timed: Whether steps are run again for their seconds, which are 0 otherwise.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        dtype: str,
        adapter: PeftConfig | None = None,
        checkpointing: bool = False,
        timed: bool = True,
    ):
        if isinstance(skeleton, PeftModel):
            adapter = skeleton.active_peft_config
        base: Any = skeleton.get_base_model() if isinstance(skeleton, PeftModel) else skeleton
        self.skeleton, self.dtype, self._timed = skeleton, getattr(torch, dtype), timed
        self._config = base.config
        self.layers = int(base.config.num_hidden_layers)
        self.alone = Sharding(torch.accelerator.current_accelerator() or torch.device("cpu"))
        self.host = psutil.Process().memory_info().rss
        self.process = 0 if self.alone.device.type == "cuda" else self.host
        self.models = [self._model(layers, adapter, checkpointing) for layers in LAYERS]
        self.weights = (
            sum(parameter.shape.numel() for parameter in canonical_parameters(skeleton))
            * self.dtype.itemsize
        )

    def _model(
        self, layers: int, adapter: PeftConfig | None = None, checkpointing: bool = False
    ) -> nn.Module:
        small = copy.deepcopy(self._config)
        small.num_hidden_layers = layers
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:layers]
        with torch.random.fork_rng(), self.alone.device:
            base: Any = AutoModelForCausalLM.from_config(
                small, dtype=self.dtype, trust_remote_code=False
            )
            if checkpointing:
                base.gradient_checkpointing_enable()
            model: nn.Module = (
                base if adapter is None else get_peft_model(base, copy.deepcopy(adapter))
            )
        return model.eval()

    def stored(self, place: Path) -> list[StoredModel]:
        """Both models as checkpoints, without the LoRA, of other random weights each time."""
        found = []
        for layers in LAYERS:
            cast(Any, self._model(layers)).save_pretrained(place / str(layers))
            found.append(StoredModel.open(str(place / str(layers))))
        return found

    def deltas(self, modules: Iterable[str], rank: int) -> list[dict[str, LowRankDelta]]:
        """Random deltas on the like of `modules` in every layer of both models."""
        kinds = {re.sub(r"\.\d+\.", ".*.", name, count=1) for name in modules}
        return [
            {
                name: LowRankDelta(
                    torch.randn(rank, shape[1]) * 1e-3, torch.randn(shape[0], rank) * 1e-3
                )
                for name, module in canonical_modules(model).items()
                if re.sub(r"\.\d+\.", ".*.", name, count=1) in kinds
                and (shape := linear_shape(module))
            }
            for model in self.models
        ]

    def measure(self, run: Callable[[int], Any], on_host: bool = False) -> _Pair:
        """Runs a step on both models (0 and 1), once to see its memory and then, in turn, for the
        time.
        """
        memory = [self._bytes(partial(run, index), on_host) for index in (0, 1)]
        if not self._timed:
            return _Pair((0.0, 0.0), (memory[0], memory[1]))
        times = [
            [self._seconds(partial(run, index)) for index in (0, 1)] for _ in range(REPETITIONS)
        ]
        fast, slow = (min(pair[index] for pair in times) for index in (0, 1))
        return _Pair((fast, slow), (memory[0], memory[1]))

    def _bytes(self, run: Callable[[], Any], on_host: bool) -> int:
        if on_host or self.alone.device.type != "cuda":
            with _Allocations() as allocations:
                run()
            return allocations.peak
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    def _seconds(self, run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        if self.alone.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


class _Allocations(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, count: int) -> None:
        self._alive.discard(key)
        self._now -= count


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
    deltas = probe.deltas(vector.deltas, vector.rank)
    stored = sum(
        t.numel() * t.element_size() for delta in vector.deltas.values() for t in (delta.a, delta.b)
    )
    held = probe.process + launch.held(probe.weights, probe.dtype.itemsize) + stored
    costs = {
        "recalibrate": _recalibration(probe, config, vector, tokenizer, shots, launch, deltas, held)
    }
    prompts = [
        [list(prompt.messages) for prompt in kind] for kind in shots.unseen.prompts.values() if kind
    ]
    if prompts:
        answers = [
            _generation(
                probe,
                tokenizer,
                messages,
                config.measure.max_new_tokens,
                config.batch_size or ON_CPU,
                launch,
                deltas,
            )
            for messages in prompts
        ]
        costs["measure"] = Cost(
            2 * sum(seconds for seconds, _ in answers), held + max(peak for _, peak in answers)
        )
    return costs | {"save": _saving(probe, config, deltas, tokenizer, held)}


def _recalibration(
    probe: Probe,
    config: SafeGeneConfig,
    vector: SafetyVector,
    tokenizer: PreTrainedTokenizerBase,
    shots: Shots,
    launch: Launch,
    deltas: Sequence[Mapping[str, LowRankDelta]],
    held: int,
) -> Cost:
    sides: dict[int, tuple[Objective, Objective]] = {}
    attachments = [_attachment(probe, index, deltas[index]) for index in (0, 1)]

    def references(index: int) -> None:
        model = probe.models[index]
        passes = Passes(padding_id(tokenizer), config.batch_size or ON_CPU)
        fit, other = (
            Objective(model, shots.data, name, config, passes, probe.alone)
            for name in ("fit", "held_out")
        )
        sides[index] = fit, other

    def gradients(index: int) -> None:
        attachment = attachments[index]
        point = np.full(len(attachment.space.names), 0.1)
        sides[index][0].gradients(probe.models[index], attachment.applied, point)

    def losses(which: int, index: int) -> None:
        with _slightly(attachments[index]):
            sides[index][which].losses(probe.models[index])

    for model in probe.models:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    lowest = min(vector.layers)
    reference = probe.measure(references)
    fit = probe.measure(gradients)
    forward, other = probe.measure(partial(losses, 0)), probe.measure(partial(losses, 1))
    # Below the vector's lowest layer there is no backward pass, and nothing is kept for one.
    fit_seconds, fit_memory = fit.at(probe.layers - lowest)
    fit_seconds += forward.at(1 + lowest)[0] - forward.at(1)[0]
    jobs = [len(side.jobs) for side in sides[1]]
    reference_seconds, reference_memory = reference.at(probe.layers)
    seconds = reference_seconds * launch.share(sum(jobs))
    seconds += config.search.max_evaluations * fit_seconds * launch.share(jobs[0])
    seconds += 2 * other.at(probe.layers)[0] * launch.share(jobs[1])
    kept = sum(tensor.nbytes for side in sides[1] for tensor in side.reference.values())
    kept = kept if probe.alone.device.type == "cpu" else 0
    return Cost(seconds, held + max(reference_memory, kept + fit_memory))


def _attachment(probe: Probe, index: int, deltas: Mapping[str, LowRankDelta]) -> VectorAttachment:
    rank = next(iter(deltas.values())).a.shape[0]
    space = CoefficientSpace.of(deltas, [rank], "layer")
    return VectorAttachment(probe.models[index], deltas, space, probe.alone)


def _slightly(attachment: VectorAttachment) -> AbstractContextManager[None]:
    """The vector on with some coefficients."""
    return attachment.applied(
        torch.full((len(attachment.space.names),), 0.1, device=attachment.sharding.device)
    )


def _generation(
    probe: Probe,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    max_new_tokens: int,
    batch_size: int,
    launch: Launch,
    deltas: Sequence[Mapping[str, LowRankDelta]] | None = None,
) -> tuple[float, int]:
    """Seconds and transient bytes of greedy answers to all prompts, from those to one batch of
    them.
    """
    sample = prompts[:batch_size]

    def run(index: int) -> None:
        on = (
            nullcontext() if deltas is None else _slightly(_attachment(probe, index, deltas[index]))
        )
        with torch.no_grad(), on:
            generate_answers(
                probe.models[index], tokenizer, sample, max_new_tokens, batch_size, probe.alone
            )

    seconds, memory = probe.measure(run).at(probe.layers)
    batches = math.ceil(len(prompts) / batch_size)
    return seconds * len(prompts) / len(sample) * launch.share(batches), memory


def _saving(
    probe: Probe,
    config: SafeGeneConfig,
    deltas: Sequence[Mapping[str, LowRankDelta]],
    tokenizer: PreTrainedTokenizerBase,
    held: int,
) -> Cost:
    def run(index: int, folder: Path) -> None:
        model, own = probe.models[index], deltas[index]
        coefficients = dict.fromkeys(own, 0.1)
        if config.output.output_format != "adapter":
            save_merged(
                model,
                own,
                coefficients,
                tokenizer,
                folder,
                config.output.max_shard_size,
                probe.alone,
            )
        if config.output.output_format != "merged":
            save_adapter(
                model, own, coefficients, "base", tokenizer, folder / "adapter", probe.alone
            )

    seconds, memory, disk = _written(probe, run, config.output.output_dir)
    return Cost(seconds, held + memory, disk)


def _written(
    probe: Probe, write: Callable[[int, Path], None], output_dir: str | None, on_host: bool = False
) -> tuple[float, int, int]:
    """Seconds, transient bytes and bytes on disk of what `write` writes to a folder, on the disk of
    the output.
    """
    sizes = [0, 0]

    def run(index: int) -> None:
        with tempfile.TemporaryDirectory(dir=_place(output_dir)) as place:
            with atomic_directory(Path(place) / "out") as folder:
                write(index, folder)
            sizes[index] = sum(
                path.stat().st_size for path in Path(place).rglob("*") if path.is_file()
            )

    cost = probe.measure(run, on_host)
    # Each weight is made by itself: the largest one counts, however many there are.
    disk = sizes[0] + (probe.layers - LAYERS[0]) * (sizes[1] - sizes[0]) // (LAYERS[1] - LAYERS[0])
    return cost.at(probe.layers)[0], max(cost.memory), disk


@cache
def _bytes_of_merging_process() -> int:
    """Resident bytes of a process that has imported what a merge from files works with.

    The estimate itself imports more, so it does not ask for its own.
    """
    program = (
        "import psutil, safegene_trl.step.stored_fine_tune; "
        "print(psutil.Process().memory_info().rss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    return int(done.stdout)


def estimate_stored_merge(
    probe: Probe, config: SafeGeneConfig, vector: SafetyVector, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Cost]:
    """Cost of `save` where the coefficients are given and the weights are merged from file to file."""
    deltas = probe.deltas(vector.deltas, vector.rank)
    with tempfile.TemporaryDirectory(dir=_place(config.output.output_dir)) as place:
        stored = probe.stored(Path(place))

        def run(index: int, folder: Path) -> None:
            own = deltas[index]
            added, size = dict.fromkeys(own, 0.1), config.output.max_shard_size
            write_merged(stored[index], own, added, tokenizer, folder, size, show_progress=False)

        seconds, memory, disk = _written(probe, run, config.output.output_dir, on_host=True)
    return {"save": Cost(seconds, _bytes_of_merging_process() + memory, disk)}


def estimate_extraction(
    probe: Probe,
    config: ExtractionConfig,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
    modules: Iterable[str],
    rank: int,
    by_adapters: bool,
    launch: Launch,
) -> dict[str, Cost]:
    """Costs of the steps of `safegene extract`.

    Args:
        probe: Of the degraded model, with its LoRA if it has one.
        config: How the vector is made.
        tokenizer: The aligned model's.
        harmful: All harmful prompts.
        benign: All benign prompts.
        modules: The modules in which the two models differ.
        rank: The vector's rank.
        by_adapters: Whether the two differ by LoRAs only, so that no weight has to be read.
        launch: How it will be launched.
    """
    deltas = probe.deltas(modules, rank)
    held = probe.process + launch.held(probe.weights, probe.dtype.itemsize)
    costs = {"difference": _difference(probe, config, rank, by_adapters)}
    drawn = harmful[: config.num_safety_prompts], benign[: config.num_benign_prompts]
    answers = [
        _generation(
            probe,
            tokenizer,
            [_turn(text) for text in texts],
            config.max_new_tokens,
            config.batch_size,
            launch,
        )
        for texts in drawn
    ]
    costs["answers"] = Cost(
        sum(seconds for seconds, _ in answers), held + max(peak for _, peak in answers)
    )
    pad, samples = (
        padding_id(tokenizer),
        [_samples(tokenizer, texts, config.max_new_tokens) for texts in drawn],
    )
    if config.method != "delta":
        costs["distillation"] = _distillation(probe, config, samples, deltas, pad, launch, held)
    passes = {
        "activation_contrast": 2
        * sum(min(config.num_selection_prompts, len(texts)) for texts in (harmful, benign)),
        "gradient": min(config.num_selection_prompts, len(samples[0])),
    }
    if config.selection in passes:

        def scores(index: int) -> None:
            if config.selection == "gradient":
                gradient(
                    probe.models[index],
                    deltas[index],
                    samples[0][:SAMPLED_PROMPTS],
                    pad,
                    probe.alone,
                )
            else:
                last_token_states(
                    probe.models[index], tokenizer, harmful[:SAMPLED_PROMPTS], probe.alone
                )

        seconds, memory = probe.measure(scores).at(probe.layers)
        costs["selection"] = Cost(
            seconds * passes[config.selection] / SAMPLED_PROMPTS, held + memory
        )
    per_layer = (
        sum(t.numel() for delta in deltas[0].values() for t in (delta.a, delta.b)) // LAYERS[0]
    )
    kept = len(top_layers(range(probe.layers), config.selected_share))
    size = per_layer * kept * getattr(torch, config.weights_dtype).itemsize
    return costs | {"save": Cost(0.0, probe.host, size)}


def _difference(probe: Probe, config: ExtractionConfig, rank: int, by_adapters: bool) -> Cost:
    if by_adapters:
        plain = nn.Module()

        def known(index: int) -> None:
            adapter_delta(plain, probe.models[index], rank)

        seconds, memory = probe.measure(known, on_host=True).at(probe.layers)
        return Cost(seconds, probe.host + memory)
    with tempfile.TemporaryDirectory(dir=_place(config.output_dir)) as place:
        stored, others = (probe.stored(Path(place) / name) for name in ("aligned", "degraded"))

        def read(index: int) -> None:
            stored_delta(stored[index], others[index], rank, config.exact_svd, config.seed, False)

        cost = probe.measure(read, on_host=True)
    seconds, memory = cost.at(probe.layers)
    return Cost(seconds, probe.host + memory)


def _distillation(
    probe: Probe,
    config: ExtractionConfig,
    samples: Sequence[Sequence[Sample]],
    deltas: Sequence[Mapping[str, LowRankDelta]],
    pad: int,
    launch: Launch,
    held: int,
) -> Cost:
    """References of one batch of each kind, one step on each and its divergence at both ends, times
    their number.
    """
    counts = [math.ceil(len(kind) / config.batch_size) for kind in samples]
    firsts = [kind[: config.batch_size] for kind in samples]
    items: dict[int, list] = {}

    def references(index: int) -> None:
        items[index] = [
            item
            for anchor, batch in enumerate(firsts)
            for item in reference_batches(
                probe.models[index], batch, len(batch), pad, bool(anchor), probe.alone
            )
        ]

    reference = probe.measure(references)
    students = [
        with_factors(copy.deepcopy(model), own)
        for model, own in zip(probe.models, deltas, strict=True)
    ]

    def steps(index: int) -> None:
        trained = [
            parameter for parameter in students[index].parameters() if parameter.requires_grad
        ]
        with expansion(students[index], config.expanded_blocks):
            for item in items[index]:
                torch.autograd.grad(mean_divergence(students[index], item), trained)

    def losses(index: int) -> None:
        with torch.no_grad(), expansion(students[index], config.expanded_blocks):
            for item in items[index]:
                mean_divergence(students[index], item)

    step, loss = probe.measure(steps), probe.measure(losses)
    batches = sum(counts) / len(firsts)  # pairs of batches
    seconds = reference.at(probe.layers)[0] * batches * launch.share(sum(counts))
    seconds += step.at(probe.layers)[0] * config.distill_steps / len(firsts)
    seconds += 2 * loss.at(probe.layers)[0] * batches * launch.share(sum(counts))
    kept = (
        sum(item.log_probs.nbytes for item in items[1]) * batches
        if probe.alone.device.type == "cpu"
        else 0
    )
    return Cost(
        seconds, held + int(kept) + max(step.at(probe.layers)[1], reference.at(probe.layers)[1])
    )


def _samples(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], response_tokens: int
) -> list[Sample]:
    """Prompts with answers as long as they may become."""
    found = []
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        filler = [ids[-1] if ids else 0] * response_tokens
        found.append(Sample(ids + filler, [False] * len(ids) + [True] * response_tokens))
    return found


def _turn(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _place(output_dir: str | None) -> Path | None:
    """A folder on the disk that will be written to; never one that is to be replaced."""
    return None if output_dir is None else nearest_folder(Path(output_dir).absolute().parent)
