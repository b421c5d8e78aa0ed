"""How a model is spread over processes, and the little the safety step needs to know and do about it.

Nothing else in the package knows how a live model is spread. A model is either *whole* in every process (one process, DDP, ZeRO-1,
ZeRO-2) or *sharded* (ZeRO-3, FSDP2): then every forward pass and every look at a weight is a collective operation, which
all ranks must reach in the same order and equally often.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from ..errors import CalibrationDataError, ConfigError, PeerError, SafeGeneError, UnsupportedModelError
from .memory import free_bytes


_MESSAGE_BYTES = 2048
ROOM_SHARE = 0.25  # of a GPU's free memory, that a tensor beside a live one may take
_TURNS = itertools.count()  # of `Sharding.alone`, the same on every rank


def _together(error: Exception) -> Exception:
    """Marks an error as one that every rank raises, so that all of them can go on after it."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def _restore(tensor: torch.Tensor, own: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.detach().copy_(own)


def _restore_gathered(tensor: Any, own: torch.Tensor) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
        _restore(tensor, own)


def _put_back(tensor: torch.Tensor, live: torch.Tensor) -> None:
    tensor.data = live


def _has_room(live: torch.Tensor) -> bool:
    """Whether another tensor like a live one can lie beside it; on a CPU one does in any case."""
    return live.device.type != "cuda" or live.nbytes <= ROOM_SHARE * free_bytes(live.device)


class Sharding:
    """The model is whole in every process: one process, DDP, ZeRO-1 or ZeRO-2.

    Args:
        device: Where this rank computes.

    Attributes:
        kind: Name of the way the model is spread, for the report.
        collective_forward: Whether a forward pass needs all ranks.
        first_pass_decides: Whether the first forward pass settles in which type gradients are kept, by what is trainable then.
    """

    kind = "whole"
    collective_forward = False
    first_pass_decides = False

    def __init__(self, device: torch.device):
        self.device = device
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {"sharding": self.kind, "processes": self.world_size}

    def least(self, number: int) -> int:
        """Collective: the smallest of all ranks' whole numbers."""
        own = torch.zeros(self.world_size, dtype=torch.long)
        own[self.rank] = number
        return int(self.sum(own).min())

    @contextmanager
    def full(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Collective: the whole of a module's `tensors` on every rank while the block is open, to be read only."""
        yield list(tensors)

    @torch.no_grad()
    def overwrite(self, tensor: torch.Tensor, whole: torch.Tensor | None, undo: ExitStack) -> None:
        """Collective: puts a whole tensor into the place of a live one.

        Where weights are sharded rank 0's `whole` counts, and every rank keeps its own shard for the way back.

        Args:
            tensor: The live one.
            whole: What takes its place; None where it stays as it is.
            undo: Is told beforehand what puts its own bits back: a signal may come at any moment.
        """
        if whole is None:
            return
        live = tensor.data
        if _has_room(live):  # the live one steps aside: nothing is copied
            undo.callback(_put_back, tensor, live)
            tensor.data = whole.to(live)
            return
        undo.callback(_restore, tensor, live.to("cpu", copy=True))
        live.copy_(whole)

    def release(self) -> None:
        """After forward and backward passes: frees what they left gathered."""

    def share(self, count: int) -> list[int | None]:
        """Which of `count` items this rank works on; as many on every rank, None where one has to mark time."""
        return [i if i < count else None for i in range(self.rank, self._padded(count), self.world_size)]

    def values(self, count: int, value: Callable[[int], torch.Tensor], idle: int = 0) -> torch.Tensor:
        """Collective: `value(i)`, a scalar from forward passes, for every i below `count`: float64, on the CPU.

        Each is worked out by one rank; a rank without one marks time with item `idle`.
        """
        found = torch.zeros(count, dtype=torch.float64)
        with self.forward_passes():
            for index in self.share(count):
                current = value(idle if index is None else index)
                self.release()
                if index is not None:
                    found[index] = float(current.detach())
        return self.sum(found)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Collective: the sum over ranks, on the CPU."""
        if self.world_size == 1:
            return tensor.cpu()
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def from_main(self, tensor: torch.Tensor) -> torch.Tensor:
        """Collective: rank 0's values of a tensor that has one shape everywhere, on the CPU."""
        return self.sum(tensor if self.is_main else torch.zeros_like(tensor))

    def _told(self, flag: bool) -> bool:
        """Collective: rank 0's yes or no."""
        return bool(self.from_main(torch.tensor([int(flag)])).item())

    def text_from_main(self, text: str) -> str:
        """Collective: rank 0's text, of any length."""
        own = torch.tensor(list(text.encode()) if self.is_main else [], dtype=torch.uint8)
        (size,) = self.from_main(torch.tensor([len(own)])).tolist()
        return bytes(self.from_main(own if self.is_main else own.new_zeros(size)).tolist()).decode()

    def united(self, texts: Sequence[str]) -> list[str]:
        """Collective: texts of which every rank has its share and empty ones in the others' places."""
        if self.world_size == 1:
            return list(texts)
        message = json.dumps(list(texts)).encode()
        sizes = torch.zeros(self.world_size, dtype=torch.long)
        sizes[self.rank] = len(message)
        rows = self._exchange(message, int(self.sum(sizes).max()))
        return ["".join(parts) for parts in zip(*map(json.loads, rows), strict=True)]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Collective at its end: all ranks leave the block well, or every rank raises.

        Inside go things that can fail on one rank alone: files, shapes, data. No collective operation may be inside.

        Raises:
            SafeGeneError: This rank's own error; or `PeerError`, naming the rank and the cause, if another's was a
                `SafeGeneError`.
            RuntimeError: Another rank failed with any other error.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.world_size > 1:
            self._raise_for_peers(failure)
        if failure is not None:
            raise failure

    def forward_passes(self) -> AbstractContextManager:
        """Around forward passes. Where those are collective a failing rank cannot tell the others: it ends the job."""
        return nullcontext() if self.collective_forward else self.agreed()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Collective at its end: rank 0 works in the block, which gets True there, and the others wait as long as it takes.

        For what may take longer than a collective operation may wait: hashing a large checkpoint, an upload. The others
        look at the process group's store, so that no operation's time-out runs. If it fails every rank raises, as with
        `agreed`.
        """
        failure: Exception | None = None
        try:
            yield self.is_main
        except Exception as error:
            failure = error
        if self.world_size > 1:
            self._wait_for_main()
            self._raise_for_peers(failure)
        if failure is not None:
            raise failure

    def _wait_for_main(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        key = f"safegene/{next(_TURNS)}"
        if self.is_main:
            store.set(key, "done")
        else:
            while not store.check([key]):
                time.sleep(0.05)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Adds to every error that leaves the block which rank it was on."""
        try:
            yield
        except Exception as error:
            if self.world_size > 1:
                error.add_note(f"SafeGene: this was rank {self.rank} of {self.world_size}.")
            raise

    def check_same(self, what: str, text: str) -> None:
        """Collective: raises `CalibrationDataError` on every rank unless all have the same `text`."""
        if self.world_size == 1:
            return
        digests = self._exchange(hashlib.sha256(text.encode()).hexdigest().encode())
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise CalibrationDataError(
                f"Rank {odd[0]} has other {what} than rank 0: give every rank the same files, and a `task_data` file if the "
                "training set differs from rank to rank."
            )

    def _padded(self, count: int) -> int:
        return -(-count // self.world_size) * self.world_size

    def _raise_for_peers(self, failure: Exception | None) -> None:
        prefix = b"" if failure is None else b"s" if isinstance(failure, SafeGeneError) else b"x"
        cause = "" if failure is None else str(failure) if prefix == b"s" else f"{type(failure).__name__}: {failure}"
        messages = self._exchange(prefix + cause.encode())
        failed = [rank for rank, message in enumerate(messages) if message]
        if failure is None and failed:
            message = messages[failed[0]].decode(errors="replace")
            text = f"Rank {failed[0]} of {self.world_size} failed: {message[1:]}"
            raise PeerError(text) if message.startswith("s") else _together(RuntimeError(text))
        if failure is not None:
            _together(failure)

    def _exchange(self, message: bytes, size: int = _MESSAGE_BYTES) -> list[bytes]:
        """Collective: every rank's message, cut to `size` bytes."""
        row = torch.zeros(size, dtype=torch.uint8)
        cut = message[:size]
        row[: len(cut)] = torch.tensor(list(cut), dtype=torch.uint8)
        own = row.to(self.device)
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own)
        return [bytes(row.tolist()).rstrip(b"\0") for row in rows]


class _Zero3(Sharding):
    """DeepSpeed ZeRO-3, with or without offloading."""

    kind = "zero3"
    collective_forward = True

    def __init__(self, device: torch.device, optimizer: Any):
        super().__init__(device)
        while not hasattr(optimizer, "release_backward_leftovers"):  # accelerate wraps DeepSpeed's, which holds it
            optimizer = optimizer.parameter_offload if hasattr(optimizer, "parameter_offload") else optimizer.optimizer
        self._offload = optimizer

    @contextmanager
    def full(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        import deepspeed

        # Without a modifier rank the weights are partitioned again on leaving and nothing is written back.
        with deepspeed.zero.GatheredParameters([tensor for tensor in tensors if hasattr(tensor, "ds_id")]):
            yield list(tensors)

    @torch.no_grad()
    def overwrite(self, tensor: Any, whole: torch.Tensor | None, undo: ExitStack) -> None:
        import deepspeed

        if not self._told(whole is not None):
            return
        if not hasattr(tensor, "ds_id"):  # a buffer, whole everywhere
            super().overwrite(tensor, self.from_main(tensor if whole is None else whole.to(tensor)), undo)
            return
        own = tensor.ds_tensor.detach().to("cpu", copy=True)
        if not tensor.ds_persist:
            undo.callback(_restore, tensor.ds_tensor, own)
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            if tensor.ds_persist:  # also held whole by every rank
                undo.callback(_restore_gathered, tensor, tensor.detach().to("cpu", copy=True))
            if whole is not None:
                tensor.detach().copy_(whole)

    def release(self) -> None:
        self._offload.release_backward_leftovers()
        self._offload.empty_partition_cache()


class _Fsdp2(Sharding):
    """PyTorch's `fully_shard`."""

    kind = "fsdp2"
    collective_forward = True
    first_pass_decides = True

    def __init__(self, device: torch.device, model: nn.Module):
        super().__init__(device)
        self._model = model

    @contextmanager
    def full(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        yield [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

    @torch.no_grad()
    def overwrite(self, tensor: torch.Tensor, whole: torch.Tensor | None, undo: ExitStack) -> None:
        if not self._told(whole is not None):
            return
        if not isinstance(tensor, DTensor):
            super().overwrite(tensor, self.from_main(tensor if whole is None else whole.to(tensor)), undo)
            return
        local = tensor.to_local()
        undo.callback(_restore, local, local.detach().to("cpu", copy=True))
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        source = empty if whole is None else whole.to(empty)
        local.copy_(distribute_tensor(source, tensor.device_mesh, tensor.placements).to_local())

    def release(self) -> None:
        # A forward pass without a backward leaves the outermost weights whole: plain parameters, freed later on.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def join_processes() -> None:
    """On a machine without an accelerator, joins the process group that a launcher has prepared.

    There accelerate would take every rank for a job of its own, and DeepSpeed would compile shared-memory operations for
    minutes; with an accelerator both do the right thing by themselves.
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

    To be called while the trainer is still alive. DDP's reducer may be the group's last owner: it is freed with the
    interpreter's lock held and joins gloo's threads, which need that lock to free the tensors of the last collectives. The
    pause lets them have it; without it about one process in thirty hung.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        if dist.get_backend() == "gloo":
            time.sleep(0.2)
        dist.destroy_process_group()


def this_job() -> Sharding:
    """The processes of this job, with no model in them yet."""
    return Sharding(PartialState().device)


def place(load: Callable[[], nn.Module], dtype: torch.dtype, job: Sharding) -> tuple[nn.Module, Sharding]:
    """Loads a finished checkpoint the way this process was launched: whole on its device, or sharded by ZeRO-3.

    Args:
        load: Loads the model. Under ZeRO-3 each weight is sharded as it comes.
        dtype: Data type of the checkpoint.
        job: From `this_job`.

    Raises:
        UnsupportedModelError: The launch asks for FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UnsupportedModelError(
            "Finished checkpoints are not loaded under FSDP: launch with `zero3` to shard them, or with `ddp`."
        )
    plugin = DeepSpeedPlugin() if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else None
    if plugin is None or plugin.zero_stage < 3:
        with job.agreed():
            return load().to(job.device), job
    import deepspeed

    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    plugin.set_deepspeed_weakref()  # from here on transformers shards what it loads
    config = {key: value for key, value in plugin.deepspeed_config.items() if value != "auto"}
    config["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if v != "auto"}
    engine, *_ = deepspeed.initialize(model=load(), config=config)
    return engine.module, _Zero3(job.device, engine.optimizer)


def sharding_of(model: nn.Module, device: torch.device | None = None, optimizer: Any = None) -> Sharding:
    """How `model` is spread.

    Args:
        model: The live model, unwrapped from any engine.
        device: Where this rank computes. Default: where the model's weights are.
        optimizer: The trainer's; ZeRO-3's machinery hangs on it.
    """
    parameters = list(model.parameters())
    device = device or parameters[0].device
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return _Zero3(device, optimizer)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return _Fsdp2(device, model)
    return Sharding(device)


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """Shape of the whole tensor, whatever part of it this rank holds."""
    return getattr(tensor, "ds_shape", tensor.shape)


def class_name(model: nn.Module) -> str:
    """Name of the model's own class; `fully_shard` puts another in front of it."""
    return next(cls.__name__ for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def check_launch(model: nn.Module, args: TrainingArguments) -> None:
    """Raises, by name, for a way of spreading a model that cannot be safeguarded in place.

    Raises:
        UnsupportedModelError: Tensor, context or sequence parallelism, or FSDP version 1.
        ConfigError: Every process takes itself for a job of its own.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
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
    found = next((name for name, key in sizes.items() if (getattr(parallelism, key, None) or 1) > 1), None)
    if (getattr(model, "_tp_size", None) or 1) > 1:
        found = "tensor"
    if found:
        raise UnsupportedModelError(
            f"The training uses {found} parallelism, which cannot be safeguarded in place: run `safegene apply` on the "
            "finished checkpoint."
        )
