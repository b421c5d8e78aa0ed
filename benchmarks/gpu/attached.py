"""What passes and decoding take with the vector on, and without it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.data.shots import Shots, gather_shots
from safegene_trl.distributed.layouts import Sharding
from safegene_trl.models.attachment import VectorAttachment, frozen_for_calibration
from safegene_trl.models.generation import generate_answers
from safegene_trl.models.inputs import batches, padding_id
from safegene_trl.models.losses import sample_losses
from safegene_trl.step.shipped_weights import merged_weights
from safegene_trl.vectors.safety_vector import SafetyVector

from .counting import Generation, copies_of, counted_generation
from .rows import Row
from .settings import (
    DEVICE,
    LORA,
    Given,
    Note,
    model_and_tokenizer,
    now,
    settings,
    task,
    vector_folder,
)


COEFFICIENT = 0.3
PROMPTS, NEW_TOKENS, REPETITIONS = 32, 32, 3


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
        decoding = _Decoding(attachment, tokenizer, vector)
        figures["copies_per_token"] = decoding.copies_per_token()
        figures["factors"] = attachment.factors.describe()
        note(figures)
        figures["decoding"] = decoding.seconds_per_token()
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

    def __init__(self, attachment: VectorAttachment, tokenizer: Any, vector: SafetyVector):
        self._attachment, self._tokenizer, self._vector = attachment, tokenizer, vector
        prompts = [row["prompt"] for row in vector.prompts[:PROMPTS]]
        self._messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
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

    def seconds_per_token(self) -> dict[str, Any]:
        """Of a batch, as the best of some runs, and what it is over that of the plain fine-tune."""
        ones = dict.fromkeys(self._attachment.space.names, COEFFICIENT)
        scaled = ScaledVector(self._vector.deltas, self._attachment.space.by_module(ones))
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
                    started = now()
                    decoded = self._answer(NEW_TOKENS)
                    runs.append((now() - started) / decoded.steps)
            seconds[name] = min(runs)
        return {
            "batch": len(self._messages),
            "generated": asdict(decoded),
            "seconds_per_token": {name: round(value, 6) for name, value in seconds.items()},
            **{name: round(seconds[name] / seconds["without"], 3) for name in ("merged", "beside")},
        }
