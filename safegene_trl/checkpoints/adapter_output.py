"""A merged model as a LoRA adapter: the fine-tune's own factors and the vector's side by side."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed.layouts import Sharding
from ..models.low_rank import LowRankDelta
from ..models.names import without_wrapper
from ..models.parameters import is_transposed, own_modules, task_factors
from .contents import ADAPTER_WEIGHTS, SAFEGUARDED
from .live_merge import check_finite, whole
from .merge_terms import ScaledVector
from .portable_files import save_processor
from .write_errors import saving, writing


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    vector: ScaledVector,
    base_name: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    sharding: Sharding,
) -> None:
    """Writes one LoRA with `[B_task, λ·B] [A_task; A]` per module: exact, no cross terms.

    It is relative to the base model of a LoRA fine-tune, or to the fine-tuned checkpoint of a full
    one. Ranks are padded with zeros to a single one and alpha = rank, because servers ignore
    per-module ranks. The weights' header says that a vector is in them, also where the file is
    copied away from its report. Collective, as `save_merged` is.
    """
    modules = own_modules(model)  # PEFT looks for the model's own names
    stacked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in modules.items():
        with whole(sharding, [], task_factors(module)) as (_, factors):
            pairs = [lora.pair() for lora in factors]
            if (canonical := without_wrapper(name)) in vector.deltas:
                pairs.append(vector.factors(canonical))
            if pairs and sharding.is_main:
                stacked[name] = (
                    torch.cat([a.cpu() for a, _ in pairs]),
                    torch.cat([b.cpu() for _, b in pairs], dim=1),
                )
    with sharding.raising_together(), writing():
        if sharding.is_main:
            transposed = any(is_transposed(modules[name]) for name in stacked)
            header = {SAFEGUARDED: "safeguarded"} if vector.deltas else {}
            _write_adapter(stacked, transposed, base_name, folder, header)
            with saving("the tokenizer"):
                save_processor(tokenizer, folder, base_name)


def _write_adapter(
    stacked: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    transposed: bool,
    base_name: str,
    folder: Path,
    header: Mapping[str, str],
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
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt", **header})
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(stacked),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_name,
        fan_in_fan_out=transposed,
    ).save_pretrained(str(folder))


def read_adapter(place: Path) -> dict[str, LowRankDelta]:
    """The low-rank deltas of an adapter folder of ours, by canonical module name."""
    tensors = load_file(place / ADAPTER_WEIGHTS)
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = [
        key.removeprefix(prefix).removesuffix(suffix) for key in tensors if key.endswith(suffix)
    ]
    return {
        without_wrapper(name): LowRankDelta(
            tensors[f"{prefix}{name}.lora_A.weight"], tensors[f"{prefix}{name}.lora_B.weight"]
        )
        for name in names
    }
