"""Merged checkpoints and folded adapters, streamed to disk: float32 add, one cast, one rename at the end."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .attach import LowRankDelta
from .errors import OutputError
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
def atomic_directory(target: Path, marker: str = MARKER) -> Iterator[Path]:
    """Gives a temporary sibling of `target` to write in, and renames it to `target` when the block ends well.

    An earlier folder of ours at `target` is kept until its successor is complete. After a failure nothing of the new
    one is left; an `OSError`, e.g. a full disk, becomes an `OutputError`.
    """
    check_output(target, marker=marker)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        if target.exists():
            replaced = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
            target.rename(replaced)
            temporary.rename(target)
            shutil.rmtree(replaced)
        else:
            temporary.rename(target)
    except OSError as error:
        raise OutputError(
            f"Writing {target} failed ({error.strerror or error}): free space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_merged(
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    coefficients: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_shard_size: str,
) -> None:
    """Writes `W + ΔW_task + λ·B·A`, added in float32 and cast once to the model's own dtype, as a full checkpoint.

    One shard is in memory at a time; the live weights are only read. `coefficients` are by module name.
    """
    parameters = {parameter.name: parameter for parameter in canonical_parameters(model)}
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty_like(parameter.tensor, device="meta") for name, parameter in parameters.items()},
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    for file_name, names in plan.filename_to_tensors.items():
        shard = {name: merged_tensor(parameters[name], deltas, coefficients) for name in names}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
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
    parameter: Parameter, deltas: Mapping[str, LowRankDelta], coefficients: Mapping[str, float]
) -> torch.Tensor:
    """One tensor of the merged checkpoint, on the CPU, contiguous."""
    weight = parameter.tensor.detach()
    name = parameter.module_name
    if parameter.name != f"{name}.weight":
        return weight.cpu().contiguous().clone()
    factors = task_factors(parameter.module)
    if name in deltas and coefficients[name] != 0:
        delta = deltas[name]
        factors.append((delta.a.float(), coefficients[name] * delta.b.float()))
    if not factors:
        return weight.cpu().contiguous().clone()
    total = weight.float().clone()
    for a, b in factors:
        update = b.to(total.device) @ a.to(total.device)
        total += update.T if is_transposed(parameter.module) else update
    return total.to(weight.dtype).cpu().contiguous()


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    deltas: Mapping[str, LowRankDelta],
    coefficients: Mapping[str, float],
    base_name: str,
    folder: Path,
) -> None:
    """Writes one LoRA with `[B_task, λ·B] [A_task; A]` per module: exact, no cross terms.

    It is relative to the base model of a LoRA fine-tune, or to the fine-tuned checkpoint of a full one. Ranks are
    padded with zeros to a single one and alpha = rank, because servers ignore per-module ranks.
    """
    modules = canonical_modules(model)
    stacked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in modules.items():
        factors = task_factors(module)
        if name in deltas:
            factors.append((deltas[name].a.float(), coefficients[name] * deltas[name].b.float()))
        if factors:
            stacked[name] = (torch.cat([a.cpu() for a, _ in factors]), torch.cat([b.cpu() for _, b in factors], dim=1))
    rank = max(a.shape[0] for a, _ in stacked.values())
    tensors = {}
    for name, (a, b) in stacked.items():
        missing = rank - a.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(stacked),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_name,
        fan_in_fan_out=any(is_transposed(modules[name]) for name in stacked),
    ).save_pretrained(str(folder))


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of the merged checkpoint's weights."""
    return sum(p.tensor.numel() * p.tensor.element_size() for p in canonical_parameters(model))


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
