"""Checkpoints that hold only the shards of a DeepSpeed ZeRO training."""

import logging
from pathlib import Path

import torch

from ..errors import UnsupportedModelError


logger = logging.getLogger(__name__)


def holds_only_zero_shards(folder: Path) -> bool:
    """Whether a checkpoint is one of DeepSpeed's own, which neither transformers nor PEFT can load."""
    return (folder / "latest").is_file() and not any(folder.glob("*.safetensors"))


def zero_weights(
    folder: Path, dtype: torch.dtype | str, allow_pickle: bool
) -> dict[str, torch.Tensor]:
    """The float32 master weights of a ZeRO checkpoint, each cast to `dtype` as soon as it is put
    together.
    """
    if not allow_pickle:
        raise UnsupportedModelError(
            f"{folder} holds only DeepSpeed's own shards, which are pickle files that can run code: convert them by "
            "DeepSpeed's `zero_to_fp32.py --safe_serialization`, or set `allow_pickled_shards` if they are yours."
        )
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise UnsupportedModelError(
            f"{folder} holds DeepSpeed shards: install `safegene-trl[deepspeed]` to read them."
        ) from error
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    if Path(tag).name != tag or not (folder / tag).is_dir():
        raise UnsupportedModelError(
            f"`latest` in {folder} does not name a folder beside it: restore the checkpoint."
        )
    logger.warning(
        "Reading DeepSpeed's shards in %s, which are pickle files that can run code.", folder
    )
    shards = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag, lazy_mode=True)
    wanted = torch.float32 if isinstance(dtype, str) else dtype
    return {name: shards[name].contiguous().to(wanted) for name in list(shards)}
