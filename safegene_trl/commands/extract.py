"""`safegene extract`: a safety vector from an aligned and a degraded model."""

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..attach import LowRankDelta
from ..calibration import conversation, draw, load_rows
from ..errors import CalibrationDataError, ConfigError, FamilyError
from ..evaluation.generation import generate_answers
from ..evaluation.refusal import is_refusal
from ..extraction.delta import dense_delta, lora_delta
from ..family import Family
from ..loading import adapter_base, load_model, load_tokenizer
from ..output import atomic_directory, check_output
from ..provenance import model_reference, sha256_of_json, software_versions
from ..selection import activation_contrast, last_token_states, top_layers
from ..vector import CONFIG_FILE, SafetyVector
from ..weights import layer_index
from .parsing import parse


logger = logging.getLogger(__name__)


@dataclass
class ExtractArguments:
    """How to make a safety vector.

    Args:
        aligned_model: The released model whose refusals are intact: directory or hub id.
        degraded_model: The same model with weakened refusals, or a LoRA on `aligned_model` that weakens them.
        output_dir: Where the vector goes.
        method: How the deltas are made. `delta` is the plain weight difference.
        rank: Rank of every delta. Default: the LoRA's own rank, else 8.
        layer_share: Share (0–1] of the layers that are kept.
        harmful_data: Harmful prompts: a column `prompt`, no answers needed.
        benign_data: Benign prompts, look-alikes above all.
        num_selection_prompts: Prompts of each kind that layers are selected by.
        num_safety_prompts: Harmful prompts stored with the vector, at most; only those the aligned model refuses.
        num_benign_prompts: Benign prompts stored with the vector, at most; only those the aligned model answers.
        max_new_tokens: Length of the aligned model's stored answers, in tokens.
        batch_size: Prompts per generated batch.
        dtype: Data type to load the models in.
        weights_dtype: Data type to store the vector in.
        seed: Seed for drawing prompts.
    """

    aligned_model: str = field(default="", metadata={"help": "Model with intact refusals: directory or hub id."})
    aligned_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit on the hub."})
    degraded_model: str = field(default="", metadata={"help": "Model or LoRA with weakened refusals."})
    degraded_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit on the hub."})
    output_dir: str = field(default="", metadata={"help": "Where the vector goes."})
    method: str = field(default="delta", metadata={"help": "How the deltas are made.", "choices": ["delta"]})
    rank: int | None = field(default=None, metadata={"help": "Rank of every delta. Default: the LoRA's own, else 8."})
    layer_share: float = field(default=0.5, metadata={"help": "Share of the layers that are kept."})
    harmful_data: str = field(default="", metadata={"help": "Harmful prompts, without answers: file or hub id."})
    benign_data: str = field(default="", metadata={"help": "Benign prompts: file or hub id."})
    data_split: str = field(default="train", metadata={"help": "Split of both data sets."})
    num_selection_prompts: int = field(default=32, metadata={"help": "Prompts of each kind for layer selection."})
    num_safety_prompts: int = field(default=64, metadata={"help": "Harmful prompts stored with the vector."})
    num_benign_prompts: int = field(default=64, metadata={"help": "Benign prompts stored with the vector."})
    max_new_tokens: int = field(default=48, metadata={"help": "Length of the stored answers."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per generated batch."})
    dtype: str = field(default="auto", metadata={"help": "Data type to load the models in."})
    weights_dtype: str = field(default="float16", metadata={"help": "Data type to store the vector in."})
    seed: int = field(default=0, metadata={"help": "Seed for drawing prompts."})

    def check(self) -> None:
        """Raises `ConfigError` for a missing or impossible value."""
        for name in ("aligned_model", "degraded_model", "output_dir", "harmful_data", "benign_data"):
            if not getattr(self, name):
                raise ConfigError(f"`{name}` is not set.")
        for name in ("dtype", "weights_dtype"):
            known = ("float32", "float16", "bfloat16", *(("auto",) if name == "dtype" else ()))
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}: use one of {', '.join(known)}.")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"`rank` is {self.rank}: it must be at least 1.")
        top_layers([0.0], self.layer_share)


States = Callable[[Sequence[str]], torch.Tensor]


@dataclass
class Pair:
    """Two models of one family and their difference. `aligned` may carry the degrading LoRA, to be switched off."""

    aligned: Any
    deltas: dict[str, LowRankDelta]
    energy: dict[str, float]
    exact: bool
    aligned_states: States
    degraded_states: States


def main(argv: Sequence[str]) -> int:
    """Makes the vector and saves it to `output_dir`."""
    (arguments,) = parse((ExtractArguments,), argv, prog="safegene extract", description="Make a safety vector.")
    arguments.check()
    target = Path(arguments.output_dir)
    check_output(target, marker=CONFIG_FILE)
    vector = extract(arguments)
    with atomic_directory(target, marker=CONFIG_FILE) as folder:
        vector.save_pretrained(folder)
    if arguments.layer_share < 1 and sum(vector.selection["scores"][layer] for layer in vector.layers) <= 0:
        logger.warning(
            "No layer reacts more to harmful than to benign prompts, so this selection means little: set `layer_share: 1.0`, "
            "or degrade with data that leaves benign answers alone."
        )
    print(f"Safety vector (rank {vector.rank}, layers {', '.join(map(str, vector.layers))}): {arguments.output_dir}")
    return 0


def extract(arguments: ExtractArguments) -> SafetyVector:
    """Loads both models, takes their difference, selects layers and records the aligned model's own answers."""
    harmful = _prompts(arguments.harmful_data, arguments.data_split)
    benign = _prompts(arguments.benign_data, arguments.data_split)
    tokenizer = load_tokenizer(arguments.aligned_model, arguments.aligned_revision)
    pair = _load_pair(arguments, tokenizer)
    count, seed = arguments.num_selection_prompts, arguments.seed
    scores = activation_contrast(
        pair.aligned_states, pair.degraded_states, draw(harmful, count, seed), draw(benign, count, seed)
    )
    layers = top_layers(scores, arguments.layer_share)
    kept = getattr(torch, arguments.weights_dtype)
    deltas = {
        name: LowRankDelta(delta.a.to(kept), delta.b.to(kept))
        for name, delta in pair.deltas.items()
        if layer_index(name) in layers
    }
    return SafetyVector(
        deltas=deltas,
        family=Family.of(pair.aligned, tokenizer),
        aligned_model=model_reference(arguments.aligned_model, arguments.aligned_revision),
        degraded_model=model_reference(arguments.degraded_model, arguments.degraded_revision),
        extraction={
            "method": arguments.method,
            "exact": pair.exact,
            "rank": next(iter(deltas.values())).a.shape[0],
            "energy_kept": {name: round(pair.energy[name], 6) for name in deltas},
        },
        selection={
            "method": "activation_contrast",
            "scores": scores,
            "selected_layers": layers,
            "layer_share": arguments.layer_share,
            "prompts": min(count, len(harmful), len(benign)),
            "seed": seed,
            "harmful_data": sha256_of_json(harmful),
            "benign_data": sha256_of_json(benign),
        },
        prompts=_own_answers(arguments, pair.aligned, tokenizer, harmful, benign),
        software=software_versions(),
    )


def _prompts(source: str, split: str) -> list[str]:
    prompts = []
    for row in load_rows(source, split):
        messages, _ = conversation(row)
        if [message["role"] for message in messages] != ["user"]:
            raise CalibrationDataError(f"A prompt of {source} is not a single user turn: give single-turn prompts.")
        prompts.append(messages[0]["content"])
    return prompts


def _load_pair(arguments: ExtractArguments, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Loads the two models; exact and in half the memory where the degraded one is a LoRA on the aligned one."""
    aligned, degraded = arguments.aligned_model, arguments.degraded_model
    if _same(adapter_base(degraded, arguments.degraded_revision), aligned):
        model: Any = load_model(degraded, arguments.degraded_revision, arguments.dtype)
        deltas, energy = lora_delta(model, arguments.rank)

        def aligned_states(prompts: Sequence[str]) -> torch.Tensor:
            with model.disable_adapter():
                return last_token_states(model, tokenizer, prompts)

        degraded_states = partial(last_token_states, model, tokenizer)
        return Pair(model, deltas, energy, min(energy.values()) == 1.0, aligned_states, degraded_states)
    first = _merged(load_model(aligned, arguments.aligned_revision, arguments.dtype))
    second = _merged(load_model(degraded, arguments.degraded_revision, arguments.dtype))
    deltas, energy = dense_delta(first, second, arguments.rank or 8)
    return Pair(
        first,
        deltas,
        energy,
        False,
        partial(last_token_states, first, tokenizer),
        partial(last_token_states, second, tokenizer),
    )


def _same(base: str | None, model: str) -> bool:
    return base is not None and (base == model or Path(base).resolve() == Path(model).resolve())


def _merged(model: Any) -> Any:
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _own_answers(
    arguments: ExtractArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[str],
    benign: Sequence[str],
) -> list[dict[str, str]]:
    """Prompts with the aligned model's own answers: refused harmful ones and answered benign ones, nothing else."""
    rows = []
    wanted = (("harmful", harmful, arguments.num_safety_prompts), ("benign", benign, arguments.num_benign_prompts))
    for kind, prompts, count in wanted:
        chosen: list[str] = draw(prompts, count, arguments.seed)
        messages = [[{"role": "user", "content": prompt}] for prompt in chosen]
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            answers = generate_answers(model, tokenizer, messages, arguments.max_new_tokens, arguments.batch_size)
        rows += [
            {"prompt": prompt, "response": whole_sentences(answer), "kind": kind}
            for prompt, answer in zip(chosen, answers, strict=True)
            if is_refusal(answer) == (kind == "harmful") and answer
        ]
        if kind == "harmful" and not rows:
            raise FamilyError("The aligned model refuses none of the harmful prompts: align it first, or give others.")
    return rows


def whole_sentences(answer: str) -> str:
    """The answer without a last sentence that the token limit has cut off, unless it is the only one."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", answer)]
    return answer[: ends[-1]] if ends else answer
