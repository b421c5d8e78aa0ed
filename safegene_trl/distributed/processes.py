"""Joining the processes of a launch, leaving them, and launches that cannot be worked with."""

import os
import time

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import is_deepspeed_available
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments

from ..errors import ConfigError, UnsupportedModelError
from .layouts import Sharding
from .world_size import launched_processes


def join_processes() -> None:
    """On a machine without an accelerator, joins the process group that a launcher has prepared.

    There accelerate would take every rank for a job of its own, and DeepSpeed would compile
    shared-memory operations for minutes; with an accelerator both do the right thing by themselves.
    """
    if "LOCAL_RANK" not in os.environ or torch.accelerator.is_available():
        return
    if not is_deepspeed_available():
        dist.init_process_group("gloo")
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def leave_processes() -> None:
    """Leaves the process group together with the other ranks; without it some abort on exit.

    To be called while the trainer is still alive. DDP's reducer may be the group's last owner: it
    is freed with the interpreter's lock held and joins gloo's threads, which need that lock to free
    the tensors of the last collectives. The pause lets them have it; without it about one process
    in thirty hung.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        if dist.get_backend() == "gloo":
            time.sleep(0.2)
        dist.destroy_process_group()


def this_job() -> Sharding:
    """The processes of this job, with no model in them yet.

    Raises:
        ConfigError: A launcher has started several, and every one takes itself for a job of its
            own.
    """
    job = Sharding(PartialState().device)
    if job.world_size < launched_processes():
        raise ConfigError(
            f"The launcher started {launched_processes()} processes and this one sees {job.world_size}: call "
            '`torch.distributed.init_process_group("gloo")` first, or run the script without a launcher.'
        )
    return job


def check_parallelism(model: nn.Module, args: TrainingArguments) -> None:
    """Raises, by name, for a way of spreading a model that cannot be safeguarded in place.

    Raises:
        UnsupportedModelError: Tensor, context, sequence or expert parallelism, or FSDP version 1.
        ConfigError: Every process takes itself for a job of its own.
    """
    launched = launched_processes()
    if args.world_size < launched:
        raise ConfigError(
            f"The launcher started {launched} processes and the trainer sees {args.world_size}: set `use_cpu: true` where "
            "there is no accelerator."
        )
    if isinstance(model, FullyShardedDataParallel):
        raise UnsupportedModelError(
            "The training uses FSDP version 1, which hides the weights: set `fsdp_version: 2`, or run `safegene apply` on "
            "the finished checkpoint."
        )
    parallelism = getattr(args, "parallelism_config", None)
    sizes = {"tensor": "tp_size", "context": "cp_size", "sequence": "sp_size"}
    found = next(
        (name for name, key in sizes.items() if (getattr(parallelism, key, None) or 1) > 1), None
    )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        found = "tensor"
    own = getattr(getattr(model, "config", None), "distributed_config", None)  # transformers' own
    if (getattr(own, "ep_size", None) or 1) > 1 or getattr(own, "enable_expert_parallel", False):
        found = "expert"
    if found:
        raise UnsupportedModelError(
            f"The training uses {found} parallelism, which cannot be safeguarded in place: run `safegene apply` on the "
            "finished checkpoint."
        )
