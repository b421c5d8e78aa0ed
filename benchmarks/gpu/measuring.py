"""The work of a row, in a process of its own."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from safegene_trl import SafeGeneCallback
from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.data.shots import Shots, gather_shots
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.models.attachment import VectorAttachment, frozen_for_calibration
from safegene_trl.models.generation import generate_answers
from safegene_trl.models.inputs import batches, padding_id
from safegene_trl.models.losses import sample_losses
from safegene_trl.recalibration import search
from safegene_trl.reporting.clock import PhaseClock
from safegene_trl.step.shipped_weights import merged_weights
from safegene_trl.vectors.safety_vector import SafetyVector

from .counting import (
    Generation,
    copies_of,
    counted_generation,
    counted_search,
    passes_to_1_percent,
)
from .rows import Row
from .settings import (
    DEVICE,
    LORA,
    ON_GPU,
    model_and_tokenizer,
    settings,
    size_of,
    task,
    vector_folder,
)


# takes what is known so far, so that a process that dies has told of it
Note = Callable[[dict[str, Any]], None]
UNMEASURED_STEPS = 2  # of the training: the first ones set up what the others find
STEPS = 1000  # of the fine-tune that the step is to cost next to nothing beside
COEFFICIENT = 0.3
PROMPTS, NEW_TOKENS, REPETITIONS = 32, 32, 3


@dataclass(frozen=True)
class Given:
    """Attributes:
    model: A checkpoint of somebody's own; None for random weights.
    vector: Theirs for it; None for random ones.
    folder: For what is written meanwhile.
    """

    model: Path | None
    vector: Path | None
    folder: Path


def measure(row: Row, given: Given, note: Note) -> dict[str, Any]:
    """All figures of a row; `note` is told them as they come."""
    work = {"step": step, "attached": attached}[row.work]
    # random weights: nothing to improve
    with patch.object(search, "objection", lambda *args: ""):
        return work(row, given, note)


def step(row: Row, given: Given, note: Note) -> dict[str, Any]:
    """A short LoRA fine-tune with the safety step after it."""
    model, tokenizer = model_and_tokenizer(row, given.model)
    vector = vector_folder(row, given.vector, model, tokenizer, given.folder)
    size = size_of(row)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    config = settings(row, vector, given.folder / "safeguarded")
    callback = SafeGeneCallback(config)
    watch = _Training(figures, note)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(given.folder / "out"),
            max_steps=size.steps,
            per_device_train_batch_size=size.batch,
            gradient_accumulation_steps=size.passes,
            max_length=size.tokens,
            learning_rate=1e-4,
            use_cpu=not ON_GPU,
            bf16=ON_GPU,
            gradient_checkpointing=True,
            optim="adamw_torch",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=task(row),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
        callbacks=[callback],
    )
    trainer.callback_handler.callbacks.insert(0, watch)
    with counted_search() as passes, counted_generation() as answers, _noted_phases(figures, note):
        trainer.train()
    report = callback.report or {}
    objectives = [entry["objective"] for entry in report.get("history", [])]
    figures["search"] = {
        "objectives": objectives,
        "evaluations": len(objectives),
        "most_evaluations": config.search.max_evaluations,
        "seconds_per_evaluation": round(median(passes.seconds), 4),
        "passes_per_evaluation": passes.passes / len(passes.seconds),
        "passes_to_1_percent": passes_to_1_percent(objectives),
        "reference_bytes": passes.reference_bytes,
        "coefficients": len(report.get("coefficients", {})),
        **report.get("search", {}),
    }
    figures["generation"] = asdict(answers)
    figures["report"] = {
        key: report[key] for key in ("status", "shipped", "launch", "error") if key in report
    }
    return figures | _against_training(figures)


class _Training(TrainerCallback):
    """What a training step takes: it stands before the safety step, which resets what is measured."""

    def __init__(self, figures: dict[str, Any], note: Note):
        self._figures, self._note = figures, note
        self._clock, self._open, self._ends = PhaseClock(), ExitStack(), [0.0]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._open.enter_context(self._clock.phase("training"))
            self._ends = [_now()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(_now())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()
        seconds = [
            after - before for before, after in zip(self._ends, self._ends[1:], strict=False)
        ]
        self._figures["training"] = {
            "samples_per_step": args.train_batch_size * args.gradient_accumulation_steps,
            "tokens_per_sample": args.max_length,
            "steps": len(seconds),
            "seconds_per_step": round(median(seconds[UNMEASURED_STEPS:] or seconds), 4),
            "peak_memory_mib": self._clock.phases["training"]["peak_memory_mib"],
        }
        self._note(self._figures)


@contextmanager
def _noted_phases(figures: dict[str, Any], note: Note) -> Iterator[None]:
    """While open, every phase of the step is noted when it ends."""
    original = PhaseClock.phase

    @contextmanager
    def phase(clock: PhaseClock, name: str) -> Iterator[None]:
        with original(clock, name):
            yield
            _now()  # what was only begun is part of it
        if name != "training":
            figures["phases"] = dict(clock.phases)
            note(figures)

    with patch.object(PhaseClock, "phase", phase):
        yield


def _against_training(figures: dict[str, Any]) -> dict[str, Any]:
    """What aims are set for. A search may end early, on random weights above all: `at_most` is the
    step with all the evaluations that it may take.
    """
    phases, training, found = figures["phases"].values(), figures["training"], figures["search"]
    seconds = sum(phase["seconds"] for phase in phases)
    peak = max(phase["peak_memory_mib"] for phase in phases)
    spared = max(found["most_evaluations"] - found["evaluations"], 0)
    at_most = seconds + spared * found["seconds_per_evaluation"]
    return {
        "step_seconds": round(seconds, 3),
        "step_seconds_at_most": round(at_most, 3),
        "share_of_1000_steps": round(at_most / (STEPS * training["seconds_per_step"]), 4),
        "peak_over_training": round(peak / training["peak_memory_mib"], 3),
    }


def attached(row: Row, given: Given, note: Note) -> dict[str, Any]:
    """Passes and decoding of a LoRA fine-tune with the vector on, and without it."""
    model, tokenizer = model_and_tokenizer(row, given.model)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    place = vector_folder(row, given.vector, model, tokenizer, given.folder)
    vector = SafetyVector.from_pretrained(place)
    config = settings(row, place, given.folder / "safeguarded")
    shots = gather_shots(config, vector, tokenizer, None, task(row))
    peft_model = get_peft_model(model, LoraConfig(**LORA))
    space, sharding = vector.space(config.search.granularity), Sharding(DEVICE)
    attachment = VectorAttachment(peft_model, vector.deltas, space, sharding)
    with frozen_for_calibration(peft_model):
        figures |= _passes(attachment, shots, padding_id(tokenizer))
        note(figures)
        decoding = _Decoding(attachment, tokenizer, shots)
        figures["copies_per_token"] = decoding.copies_per_token()
        figures["factors"] = attachment.factors.describe()
        note(figures)
        figures["decoding"] = decoding.seconds_per_token(vector)
    return figures


def _passes(attachment: VectorAttachment, shots: Shots, pad_id: int) -> dict[str, Any]:
    """Copies of a pass through the model and back, once the factors are where they stay."""
    samples = shots.data.harmful.fit
    batch = batches(samples, len(samples), pad_id, DEVICE)[0]
    values = torch.full((len(attachment.space.names),), COEFFICIENT, device=DEVICE)
    values.requires_grad_()

    def with_vector() -> None:
        with attachment.applied(values):
            loss = sample_losses(attachment.model, batch).sum()
        torch.autograd.grad(loss, values)

    @torch.no_grad()
    def without() -> None:
        sample_losses(attachment.model, batch)

    first = copies_of(attachment, with_vector)
    again, plain = copies_of(attachment, with_vector), copies_of(attachment, without)
    return {
        "copies_of_the_first_pass": {
            "with_vector": first.host_to_device,
            "of_factors": first.factors,
        },
        "copies_per_pass": {
            "with_vector": again.host_to_device,
            "without": plain.host_to_device,
            "of_factors": again.factors,
        },
    }


class _Decoding:
    """Greedy answers of one batch, as the step generates them."""

    def __init__(self, attachment: VectorAttachment, tokenizer: Any, shots: Shots):
        self._attachment, self._tokenizer = attachment, tokenizer
        self._messages = [list(p.messages) for p in shots.unseen.prompts["harmful"]][:PROMPTS]
        count = len(attachment.space.names)
        self._values = torch.full((count,), COEFFICIENT, device=DEVICE)

    def _answer(self, tokens: int) -> Generation:
        with counted_generation() as seen:
            generate_answers(
                self._attachment.model,
                self._tokenizer,
                self._messages,
                tokens,
                len(self._messages),
                self._attachment.sharding,
            )
        return seen

    def copies_per_token(self) -> dict[str, Any]:
        """Those that one more token needs: what a call itself brings to the device is left out."""
        with self._attachment.applied(self._values):
            self._answer(2)
            on = self._slope()
        off = self._slope()
        return {"with_vector": on[0], "without": off[0], "of_factors": on[1]}

    def _slope(self) -> tuple[float | None, float | None]:
        found = []
        for tokens in (4, 8):
            seen: list[Generation] = []
            copies = copies_of(
                self._attachment, lambda n=tokens, to=seen: to.append(self._answer(n))
            )
            found.append((seen[0].steps, copies.host_to_device, copies.factors))
        (few, *before), (many, *after) = found
        if many == few:  # every answer has ended
            return None, None
        host, factors = ((b - a) / (many - few) for a, b in zip(before, after, strict=True))
        return host, factors

    def seconds_per_token(self, vector: SafetyVector) -> dict[str, Any]:
        """Of a batch, as the best of some runs, and what it is over that of the plain fine-tune."""
        ones = dict.fromkeys(self._attachment.space.names, COEFFICIENT)
        scaled = ScaledVector(vector.deltas, self._attachment.space.by_module(ones))
        model, sharding = self._attachment.model, self._attachment.sharding
        ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "without": nullcontext,
            "merged": lambda: merged_weights(model, scaled, sharding),
            "beside": lambda: self._attachment.applied(self._values),
        }
        seconds, decoded = {}, Generation()
        for name, way in ways.items():
            with way():
                self._answer(2)
                runs = []
                for _ in range(REPETITIONS):
                    started = _now()
                    decoded = self._answer(NEW_TOKENS)
                    runs.append((_now() - started) / decoded.steps)
            seconds[name] = min(runs)
        return {
            "batch": len(self._messages),
            "generated": asdict(decoded),
            "seconds_per_token": {name: round(value, 6) for name, value in seconds.items()},
            **{name: round(seconds[name] / seconds["without"], 3) for name in ("merged", "beside")},
        }


def _now() -> float:
    """Seconds, when the device has done all it was told to."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()
