"""Merged checkpoints and folded adapters, streamed to disk: float32 add, one cast, one rename at
the end.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..distributed.shapes import class_name
from ..errors import OutputError
from ..models.low_rank import LowRankDelta
from ..models.parameters import (
    Parameter,
    TaskFactors,
    as_stored,
    base_model,
    canonical_modules,
    canonical_parameters,
    is_transposed,
    task_factors,
)
from ..models.rounding import Rounding
from .output import saving, writing
from .tensor_file import SAFE_WEIGHTS_INDEX_NAME, TensorFile, plan_files


@dataclass(frozen=True)
class Term:
    """One low-rank addition to a weight as it is stored: `left @ right`, rows×r and r×columns,
    float32.

    With DoRA's `magnitude` (rows, float32) every row is scaled to that norm afterwards (arXiv
    2402.09353).
    """

    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor | None = None


Coefficient = float | torch.Tensor


def add_terms(rows: torch.Tensor, terms: Sequence[Term], first_row: int = 0) -> None:
    """Adds terms, in their order, to float32 rows of a weight in place; `rows[0]` is the weight's
    row `first_row`.
    """
    part = slice(first_row, first_row + len(rows))
    for term in terms:
        rows.addmm_(term.left[part].to(rows.device), term.right.to(rows.device))
        if term.magnitude is not None:
            rows.mul_((term.magnitude[part].to(rows.device) / rows.norm(dim=1))[:, None])


def task_terms(factors: Sequence[TaskFactors], transposed: bool) -> list[Term]:
    """What the fine-tune's own LoRAs add to their module's weight."""
    return [_term(*lora.pair(), transposed, lora.magnitude) for lora in factors]


def vector_terms(
    delta: LowRankDelta | None, coefficient: Coefficient, transposed: bool
) -> list[Term]:
    """What the safety vector adds to a module's weight: `λ·B·A`, nothing where λ is 0."""
    if delta is None or not torch.as_tensor(coefficient).any():
        return []
    return [_term(*_scaled(delta, coefficient), transposed)]


def _term(
    a: torch.Tensor, b: torch.Tensor, transposed: bool, magnitude: torch.Tensor | None = None
) -> Term:
    return Term(a.T.contiguous(), b.T.contiguous()) if transposed else Term(b, a, magnitude)


def save_merged(
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    coefficients: Mapping[str, Coefficient],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_shard_size: str,
    sharding: Sharding,
    mark: Mapping[str, Any] | None = None,
) -> None:
    """Writes `W + ΔW_task + λ·B·A`, added in float32 and cast once to the model's own dtype, as a
    full checkpoint.

    Collective: every rank calls it, rank 0 writes. One weight is gathered at a time and only that
    one is in rank 0's memory; the live weights are only read. `coefficients` are by module name:
    one, or one of each of its r rank-one parts. `mark` goes into its `config.json` (see
    `lineage.py`).
    """
    parameters = list(canonical_parameters(model))
    parts = {
        parameter.name: as_stored(
            model,
            parameter.name,
            torch.empty(parameter.shape, dtype=parameter.tensor.dtype, device="meta"),
        )
        for parameter in parameters
    }
    contents = {
        name: (part.dtype, part.shape) for group in parts.values() for name, part in group.items()
    }
    with ExitStack() as files:
        with sharding.raising_together(), writing():
            if sharding.is_main:
                place = _Files(folder, contents, max_shard_size, files)
                save_record(model, tokenizer, folder, mark)
        for parameter in parameters:
            tensor = merged_tensor(parameter, deltas, coefficients, sharding)
            with sharding.raising_together(), writing():
                if sharding.is_main and tensor is not None:
                    if deltas:  # a plain fine-tune is kept as it is
                        check_finite(parameter.name, tensor)
                    place.write(as_stored(model, parameter.name, tensor.cpu()))


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises `OutputError` for a tensor with NaN or infinity in it."""
    if (
        tensor.is_floating_point()
        and tensor.element_size() > 1
        and not bool(tensor.isfinite().all())
    ):
        raise OutputError(
            f"The fine-tune's {name} is not finite, so nothing is written: train it again, with a lower learning rate or in "
            "float32."
        )


class _Files:
    """The weight files of a checkpoint; each is closed, and on disk, as soon as its last tensor is
    written.

    To wait for the disk at the end would keep the other ranks waiting past their time-out.
    """

    def __init__(
        self, folder: Path, contents: Mapping[str, Any], max_shard_size: str, stack: ExitStack
    ):
        plan, index = plan_files(contents, max_shard_size)
        if index:
            write_index(index, folder)
        self._missing = {file: set(names) for file, names in plan.items()}
        self._file_of = {name: file for file, names in plan.items() for name in names}
        self._open = {
            file: stack.enter_context(
                TensorFile(folder / file, {name: contents[name] for name in names})
            )
            for file, names in plan.items()
        }

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            file = self._file_of[name]
            self._open[file].write(name, tensor.contiguous())
            self._missing[file].discard(name)
            if not self._missing[file]:
                self._open[file].close()


def write_index(index: Mapping[str, Any], folder: Path) -> None:
    """Writes the index of a checkpoint of more than one file."""
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def save_record(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    mark: Mapping[str, Any] | None,
) -> None:
    """Writes all of a checkpoint but the weights: configs, tokenizer, chat template."""
    base = base_model(model)
    config = deepcopy(base.config)  # the live model stays the plain fine-tune
    config.architectures = [class_name(base)]  # unset where the model was built from a config
    for key, value in (mark or {}).items():
        setattr(config, key, value)
    with saving("the model's config"):
        config.save_pretrained(folder)
    if base.generation_config is not None:
        with saving("the generation config"):
            base.generation_config.save_pretrained(folder)
    with saving("the tokenizer"):
        tokenizer.save_pretrained(folder)


@contextmanager
def full_float32() -> Iterator[None]:
    """While open, float32 products are float32: trainers let NVIDIA GPUs round their factors to 10
    bits (TF32).
    """
    backend = torch.backends.cuda.matmul
    name, exact = (
        ("fp32_precision", "ieee") if hasattr(backend, "fp32_precision") else ("allow_tf32", False)
    )  # torch < 2.9
    before = getattr(backend, name)
    setattr(backend, name, exact)
    try:
        yield
    finally:
        setattr(backend, name, before)


@torch.no_grad()
def merged_tensor(
    parameter: Parameter,
    deltas: Mapping[str, LowRankDelta],
    coefficients: Mapping[str, Coefficient],
    sharding: Sharding,
    rounding: Rounding | None = None,
) -> torch.Tensor | None:
    """Collective: one tensor of the merged model, whole, contiguous and in its own data type.

    It is a copy: on rank 0, and on every rank that holds whole weights anyway; what is merged on
    the live tensor's device, the rest on the CPU.

    Args:
        parameter: Which.
        deltas: The vector's deltas by canonical module name.
        coefficients: By module name: one λ, or one of each of the delta's r rank-one parts.
        sharding: How the model is spread over ranks.
        rounding: Is told what the cast to the data type leaves of the vector's part.
    """
    name, module = parameter.module_name, parameter.module
    with _whole(sharding, [parameter.tensor], module if parameter.is_weight else None) as (
        tensors,
        factors,
    ):
        if sharding.collective_forward and not sharding.is_main:
            return None
        weight = tensors[0].detach()
        transposed = is_transposed(module)
        terms = task_terms(factors, transposed)
        of_vector: list[Term] = []
        if parameter.is_weight and name in deltas:
            of_vector = vector_terms(deltas[name], coefficients[name], transposed)
        if not terms and not of_vector:
            return weight.to("cpu", copy=True).contiguous()
        with full_float32():
            total = weight.float().clone()
            add_terms(total, terms)
            before = total.clone() if rounding is not None and of_vector else None
            add_terms(total, of_vector)
        rounded = total.to(weight.dtype)
        if rounding is not None and before is not None:
            exact = not terms  # nothing was added yet to what the weight's own type holds
            rounding.add(parameter.name, before, total, rounded, before_is_rounded=exact)
        return rounded.contiguous()


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    coefficients: Mapping[str, Coefficient],
    base_name: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    sharding: Sharding,
) -> None:
    """Writes one LoRA with `[B_task, λ·B] [A_task; A]` per module: exact, no cross terms.

    It is relative to the base model of a LoRA fine-tune, or to the fine-tuned checkpoint of a full
    one. Ranks are padded with zeros to a single one and alpha = rank, because servers ignore
    per-module ranks. Collective, as `save_merged` is.
    """
    modules = canonical_modules(model)
    stacked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in modules.items():
        with _whole(sharding, [], module) as (_, factors):
            pairs = [lora.pair() for lora in factors]
            if name in deltas:
                pairs.append(_scaled(deltas[name], coefficients[name]))
            if pairs and sharding.is_main:
                stacked[name] = (
                    torch.cat([a.cpu() for a, _ in pairs]),
                    torch.cat([b.cpu() for _, b in pairs], dim=1),
                )
    with sharding.raising_together(), writing():
        if sharding.is_main:
            _write_adapter(
                stacked, any(is_transposed(modules[name]) for name in stacked), base_name, folder
            )
            with saving("the tokenizer"):
                tokenizer.save_pretrained(folder)


def _write_adapter(
    stacked: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    transposed: bool,
    base_name: str,
    folder: Path,
) -> None:
    rank = max(a.shape[0] for a, _ in stacked.values())
    tensors = {}
    for name, (a, b) in stacked.items():
        check_finite(f"LoRA on {name}", a)
        check_finite(f"LoRA on {name}", b)
        missing = rank - a.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(
            a, (0, 0, 0, missing)
        ).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(
            b, (0, missing)
        ).contiguous()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(stacked),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_name,
        fan_in_fan_out=transposed,
    ).save_pretrained(str(folder))


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of the merged checkpoint's weights."""
    return sum(p.shape.numel() * p.tensor.element_size() for p in canonical_parameters(model))


@contextmanager
def _whole(
    sharding: Sharding, tensors: Sequence[torch.Tensor], module: nn.Module | None
) -> Iterator[tuple[list[torch.Tensor], list[TaskFactors]]]:
    """Collective: `tensors` whole, and the task's LoRA factors on `module`."""
    factors = [] if module is None else task_factors(module)
    live = [*tensors, *(part for lora in factors for part in lora.tensors())]
    with sharding.full(live) as full:
        rest = iter(full[len(tensors) :])
        yield full[: len(tensors)], [lora.of(rest) for lora in factors]


def _scaled(delta: LowRankDelta, coefficient: Coefficient) -> tuple[torch.Tensor, torch.Tensor]:
    return delta.a.float(), coefficient * delta.b.float()
