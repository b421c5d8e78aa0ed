"""Merged checkpoints and folded adapters, streamed to disk: float32 add, one cast, one rename at the end."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .attach import LowRankDelta
from .errors import OutputError
from .sharding import Sharding
from .weights import Parameter, base_model, canonical_modules, canonical_parameters, is_transposed, task_factors


MARKER = "safegene_report.json"


def check_output(target: Path, needed_bytes: int = 0, marker: str = MARKER) -> None:
    """Raises `OutputError` unless a folder can be put at `target` without losing what others wrote there.

    A folder that holds the file `marker` is one of ours and may be replaced.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file: choose another `output_dir`.")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise OutputError(
            f"{target} holds files that SafeGene did not write: choose another `output_dir` or empty it."
        )
    parent = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} is not writable: choose another `output_dir`.")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{parent} has {free / 2**30:.1f} GiB free and the checkpoint needs {needed_bytes / 2**30:.1f} GiB: free some "
            "space or choose another `output_dir`."
        )


@contextmanager
def atomic_directory(target: Path, marker: str = MARKER, sharding: Sharding | None = None) -> Iterator[Path]:
    """Gives a temporary sibling of `target` to write in, and renames it to `target` when the block ends well.

    An earlier folder of ours at `target` is kept until its successor is complete. After a failure nothing of the new
    one is left; a failure to write, e.g. a full disk, becomes an `OutputError`. Collective where a `sharding` is given:
    the folder exists on rank 0 only, and is renamed only after all ranks have come to the end.
    """
    sharding = sharding or Sharding(torch.device("cpu"))
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with sharding.agreed(), _writing():
            if sharding.is_main:
                check_output(target, marker=marker)
                folder.mkdir(parents=True)
        with _writing():
            yield folder
        with sharding.agreed(), _writing():
            for path in (*folder.rglob("*"), folder) if sharding.is_main else ():
                _sync(path)
        with sharding.agreed(), _writing():
            if sharding.is_main:
                _rename(folder, target)
    finally:
        if sharding.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    replaced = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    target.rename(replaced)
    folder.rename(target)
    shutil.rmtree(replaced)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"Writing the output failed ({error}): free space or choose another `output_dir`."
        ) from error


def save_merged(
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    coefficients: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_shard_size: str,
    sharding: Sharding,
) -> None:
    """Writes `W + ΔW_task + λ·B·A`, added in float32 and cast once to the model's own dtype, as a full checkpoint.

    Collective: every rank calls it, rank 0 writes. One weight is gathered at a time and one file of the checkpoint is in
    rank 0's memory; the live weights are only read. `coefficients` are by module name.
    """
    parameters = {parameter.name: parameter for parameter in canonical_parameters(model)}
    plan = split_torch_state_dict_into_shards(
        {
            name: torch.empty(parameter.shape, dtype=parameter.tensor.dtype, device="meta")
            for name, parameter in parameters.items()
        },
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    for file_name, names in plan.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor = merged_tensor(parameters[name], deltas, coefficients, sharding)
            if tensor is not None:
                shard[name] = tensor
        with sharding.agreed(), _writing():
            if sharding.is_main:
                _write_tensors(shard, folder / file_name)
    with sharding.agreed(), _writing():
        if sharding.is_main:
            if plan.is_sharded:
                index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            base = base_model(model)
            base.config.save_pretrained(folder)
            if base.generation_config is not None:
                base.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


@torch.no_grad()
def merged_tensor(
    parameter: Parameter,
    deltas: Mapping[str, LowRankDelta],
    coefficients: Mapping[str, float],
    sharding: Sharding,
) -> torch.Tensor | None:
    """Collective: one tensor of the merged checkpoint, on the CPU and contiguous on rank 0, None elsewhere."""
    name, module = parameter.module_name, parameter.module
    with _whole(sharding, [parameter.tensor], module if parameter.is_weight else None) as (tensors, pairs):
        if not sharding.is_main:
            return None
        weight = tensors[0].detach()
        if parameter.is_weight and name in deltas and coefficients[name] != 0:
            pairs.append(_scaled(deltas[name], coefficients[name]))
        if not pairs:
            return weight.cpu().contiguous().clone()
        total = weight.float().clone()
        for a, b in pairs:
            update = b.to(total.device) @ a.to(total.device)
            total += update.T if is_transposed(module) else update
        return total.to(weight.dtype).cpu().contiguous()


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    coefficients: Mapping[str, float],
    base_name: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    sharding: Sharding,
) -> None:
    """Writes one LoRA with `[B_task, λ·B] [A_task; A]` per module: exact, no cross terms.

    It is relative to the base model of a LoRA fine-tune, or to the fine-tuned checkpoint of a full one. Ranks are
    padded with zeros to a single one and alpha = rank, because servers ignore per-module ranks. Collective, as
    `save_merged` is.
    """
    modules = canonical_modules(model)
    stacked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in modules.items():
        with _whole(sharding, [], module) as (_, pairs):
            if name in deltas:
                pairs.append(_scaled(deltas[name], coefficients[name]))
            if pairs and sharding.is_main:
                stacked[name] = torch.cat([a.cpu() for a, _ in pairs]), torch.cat([b.cpu() for _, b in pairs], dim=1)
    with sharding.agreed(), _writing():
        if sharding.is_main:
            _write_adapter(stacked, any(is_transposed(modules[name]) for name in stacked), base_name, folder)
            tokenizer.save_pretrained(folder)


def _write_adapter(
    stacked: Mapping[str, tuple[torch.Tensor, torch.Tensor]], transposed: bool, base_name: str, folder: Path
) -> None:
    rank = max(a.shape[0] for a, _ in stacked.values())
    tensors = {}
    for name, (a, b) in stacked.items():
        missing = rank - a.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    folder.mkdir(exist_ok=True)
    _write_tensors(tensors, folder / "adapter_model.safetensors")
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
) -> Iterator[tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Collective: `tensors` whole, and the task's LoRA pairs on `module` as float32 `(A, B)`."""
    factors = [] if module is None else task_factors(module)
    live = [*tensors, *(half for lora in factors for half in (lora.a, lora.b))]
    with sharding.full(live) as full:
        halves = iter(full[len(tensors) :])
        pairs = [replace(lora, a=next(halves), b=next(halves)).pair() for lora in factors]
        yield full[: len(tensors)], pairs


def _scaled(delta: LowRankDelta, coefficient: float) -> tuple[torch.Tensor, torch.Tensor]:
    return delta.a.float(), coefficient * delta.b.float()


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # Synchronised file by file: to do so at the end would keep the other ranks waiting past their time-out.
    save_file(dict(tensors), path, metadata={"format": "pt"})
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
