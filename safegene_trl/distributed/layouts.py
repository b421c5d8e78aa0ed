"""How a live model is spread over processes, and the little the safety step needs to know and do
about it.

Nothing else in the package knows how a live model is spread. A model is either *whole* in every
process (one process, DDP, ZeRO-1, ZeRO-2) or *sharded* (ZeRO-3, FSDP2): then every forward pass and
every look at a weight is a collective operation, which all ranks must reach in the same order and
equally often.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UnsupportedModelError
from .communicator import Communicator
from .memory import free_bytes


ROOM_SHARE = 0.25  # of a GPU's free memory, that a tensor beside a live one may take


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


class Sharding(Communicator):
    """The model is whole in every process: one process, DDP, ZeRO-1 or ZeRO-2.

    Attributes:
        kind: Name of the way the model is spread, for the report.
        collective_forward: Whether a forward pass needs all ranks.
        first_pass_decides: Whether the first forward pass settles in which type gradients are kept,
            by what is trainable then.
        widens: Whether the host may turn 16-bit weights into float32 ones to spread them.
    """

    kind = "whole"
    collective_forward = False
    first_pass_decides = False
    widens = False

    def __init__(self, device: torch.device, model: nn.Module | None = None, optimizer: Any = None):
        """Of a job, or of a live model, unwrapped from any engine, with its trainer's optimizer."""
        super().__init__(device)

    @classmethod
    def spreads(cls, model: nn.Module) -> bool:
        """Whether a live model is spread in this way."""
        return True

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {"sharding": self.kind, "processes": self.world_size}

    @contextmanager
    def full(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Collective: the whole of a module's `tensors` on every rank while the block is open, to
        be read only.
        """
        yield list(tensors)

    @torch.no_grad()
    def overwrite(self, tensor: torch.Tensor, whole: torch.Tensor | None, undo: ExitStack) -> None:
        """Collective: puts a whole tensor into the place of a live one.

        Where weights are sharded rank 0's `whole` counts, and every rank keeps its own shard for
        the way back.

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

    def trained_parts(self, model: nn.Module) -> list[torch.Tensor]:
        """What this rank holds of every trained tensor, to be read only."""
        return [tensor.detach() for tensor in model.parameters() if tensor.requires_grad]

    def reshard(self) -> None:
        """After forward and backward passes: frees what they left gathered."""

    def values(
        self, count: int, value: Callable[[int], torch.Tensor], idle: int = 0
    ) -> torch.Tensor:
        """Collective: `value(i)`, a scalar from forward passes, for every i below `count`: float64,
        on the CPU.

        Each is worked out by one rank; a rank without one marks time with item `idle`.
        """
        found = torch.zeros(count, dtype=torch.float64)
        with self.forward_passes():
            for index in self.share(count):
                current = value(idle if index is None else index)
                self.reshard()
                if index is not None:
                    found[index] = float(current.detach())
        return self.sum(found)

    def forward_passes(self) -> AbstractContextManager:
        """Around forward passes. Where those are collective a failing rank cannot tell the others:
        it ends the job.
        """
        return nullcontext() if self.collective_forward else self.raising_together()


class _Zero3(Sharding):
    """DeepSpeed ZeRO-3, with or without offloading."""

    kind = "zero3"
    collective_forward = True

    def __init__(self, device: torch.device, model: nn.Module, optimizer: Any):
        super().__init__(device)
        # accelerate wraps DeepSpeed's, which holds it
        while not hasattr(optimizer, "release_backward_leftovers"):
            optimizer = (
                optimizer.parameter_offload
                if hasattr(optimizer, "parameter_offload")
                else optimizer.optimizer
            )
        self._offload = optimizer

    @classmethod
    def spreads(cls, model: nn.Module) -> bool:
        return any(hasattr(parameter, "ds_id") for parameter in model.parameters())

    @contextmanager
    def full(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        import deepspeed

        # Without a modifier rank the weights are partitioned again on leaving and nothing is
        # written back.
        with deepspeed.zero.GatheredParameters(
            [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        ):
            yield list(tensors)

    @torch.no_grad()
    def overwrite(self, tensor: Any, whole: torch.Tensor | None, undo: ExitStack) -> None:
        import deepspeed

        if not self._broadcast_flag(whole is not None):
            return
        if not hasattr(tensor, "ds_id"):  # a buffer, whole everywhere
            super().overwrite(
                tensor, self.broadcast(tensor if whole is None else whole.to(tensor)), undo
            )
            return
        own = tensor.ds_tensor.detach().to("cpu", copy=True)
        if not tensor.ds_persist:
            undo.callback(_restore, tensor.ds_tensor, own)
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            if tensor.ds_persist:  # also held whole by every rank
                undo.callback(_restore_gathered, tensor, tensor.detach().to("cpu", copy=True))
            if whole is not None:
                tensor.detach().copy_(whole)

    def trained_parts(self, model: nn.Module) -> list[torch.Tensor]:
        trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
        return [getattr(tensor, "ds_tensor", tensor).detach() for tensor in trained]

    def reshard(self) -> None:
        self._offload.release_backward_leftovers()
        self._offload.empty_partition_cache()


class _Fsdp2(Sharding):
    """PyTorch's `fully_shard`."""

    kind = "fsdp2"
    collective_forward = True
    first_pass_decides = True
    widens = True  # under mixed precision

    def __init__(self, device: torch.device, model: nn.Module, optimizer: Any = None):
        super().__init__(device)
        self._model = model

    @classmethod
    def spreads(cls, model: nn.Module) -> bool:
        return any(isinstance(module, FSDPModule) for module in model.modules())

    @contextmanager
    def full(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        yield [
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors
        ]

    @torch.no_grad()
    def overwrite(self, tensor: torch.Tensor, whole: torch.Tensor | None, undo: ExitStack) -> None:
        if not self._broadcast_flag(whole is not None):
            return
        if not isinstance(tensor, DTensor):
            super().overwrite(
                tensor, self.broadcast(tensor if whole is None else whole.to(tensor)), undo
            )
            return
        local = tensor.to_local()
        undo.callback(_restore, local, local.detach().to("cpu", copy=True))
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        source = empty if whole is None else whole.to(empty)
        local.copy_(distribute_tensor(source, tensor.device_mesh, tensor.placements).to_local())

    def trained_parts(self, model: nn.Module) -> list[torch.Tensor]:
        self.reshard()  # an evaluation has left the outermost weights whole
        parts = super().trained_parts(model)
        return [part.to_local() if isinstance(part, DTensor) else part for part in parts]

    def reshard(self) -> None:
        # A forward pass without a backward leaves the outermost weights whole: plain parameters,
        # freed later on.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


# the first that a model is spread by; whole is what it is otherwise
SHARDINGS: list[type[Sharding]] = [_Zero3, _Fsdp2, Sharding]


def is_whole(model: nn.Module) -> bool:
    """Whether a live model is whole in every process."""
    return next(kind for kind in SHARDINGS if kind.spreads(model)) is Sharding


def load_distributed(
    load: Callable[[], nn.Module], dtype: torch.dtype, job: Sharding
) -> tuple[nn.Module, Sharding]:
    """Loads a finished checkpoint the way this process was launched: whole on its device, or
    sharded by ZeRO-3.

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
    plugin = _zero3_of_the_launch()
    if plugin is None:
        with job.raising_together():
            return load().to(job.device), job
    import deepspeed

    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    plugin.set_deepspeed_weakref()  # from here on transformers shards what it loads
    config = {key: value for key, value in plugin.deepspeed_config.items() if value != "auto"}
    config["zero_optimization"] = {
        k: v for k, v in config["zero_optimization"].items() if v != "auto"
    }
    engine, *_ = deepspeed.initialize(model=load(), config=config)
    return engine.module, _Zero3(job.device, engine.module, engine.optimizer)


def loads_sharded() -> bool:
    """Whether `load_distributed` shards what it loads, in a process that was launched as this was."""
    return _zero3_of_the_launch() is not None


def _zero3_of_the_launch() -> DeepSpeedPlugin | None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    plugin = DeepSpeedPlugin()
    return plugin if plugin.zero_stage >= 3 else None


def sharding_of(
    model: nn.Module, device: torch.device | None = None, optimizer: Any = None
) -> Sharding:
    """How `model` is spread.

    Args:
        model: The live model, unwrapped from any engine.
        device: Where this rank computes. Default: where the model's weights are.
        optimizer: The trainer's; ZeRO-3's machinery hangs on it.
    """
    kind = next(kind for kind in SHARDINGS if kind.spreads(model))
    return kind(device or next(model.parameters()).device, model, optimizer)
