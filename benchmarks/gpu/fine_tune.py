"""What the safety step takes after a short LoRA fine-tune, beside that fine-tune."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any
from unittest.mock import patch

from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from safegene_trl import SafeGeneCallback
from safegene_trl.reporting.clock import PhaseClock

from .counting import counted_generation, counted_search, passes_to_1_percent
from .rows import Row
from .settings import (
    LORA,
    ON_GPU,
    Given,
    Note,
    model_and_tokenizer,
    now,
    settings,
    size_of,
    task,
    vector_folder,
)


UNMEASURED_STEPS = 2  # of the training: the first ones set up what the others find
STEPS = 1000  # of the fine-tune that the step is to cost next to nothing beside


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
    """What a training step takes. It stands before the safety step, which resets what is
    measured.
    """

    def __init__(self, figures: dict[str, Any], note: Note):
        self._figures, self._note = figures, note
        self._clock, self._open, self._ends = PhaseClock(), ExitStack(), [0.0]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._open.enter_context(self._clock.phase("training"))
            self._ends = [now()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(now())

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
            now()  # what was only begun is part of it
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
