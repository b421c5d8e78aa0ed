"""Steps run for real, on models of the same architecture with random weights and only one and three
layers.

What a step takes is linear in the number of layers,

    T(L) = T(1) + (L − 1) · (T(3) − T(1)) / 2,

in seconds and in bytes. To be believed it must run on the kind of machine that the command will run
on. Bytes are those that tensors hold: on a CPU the C library's allocator may keep up to about as
much again of what was freed.
"""

import copy
import itertools
import re
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ..checkpoints.atomic_writes import atomic_directory
from ..checkpoints.completeness import reads_images
from ..checkpoints.preflight import nearest_folder
from ..checkpoints.stored_model import StoredModel
from ..checkpoints.write_errors import writing
from ..distributed.layouts import Sharding
from ..models.experts import matrix_shapes
from ..models.low_rank import LowRankDelta
from ..models.parameters import canonical_modules, canonical_parameters


LAYERS = (1, 3)
REPETITIONS = 3  # the fastest counts: other work on the machine only adds


@dataclass(frozen=True)
class Measured:
    """Seconds and transient bytes of one step on models of two depths."""

    seconds: tuple[float, float]
    memory: tuple[int, int]

    def at(self, layers: float) -> tuple[float, int]:
        """Extrapolated to a number of layers."""
        (fast, slow), (small, large) = self.seconds, self.memory
        more = (layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
        return fast + more * max(0.0, slow - fast), int(small + more * max(0, large - small))


class Probe:
    """The real model's architecture with few layers, twice.

    Args:
        skeleton: The real model without weights, from `load_skeleton`: its config counts.
        dtype: Name of the data type that the weights will have.
        adapter: The LoRA that the training will put on. A skeleton with a LoRA brings its own.
        checkpointing: Whether layers are recomputed in the backward pass.
        timed: Whether steps are run again for their seconds, which are 0 otherwise.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        dtype: str,
        adapter: PeftConfig | None = None,
        checkpointing: bool = False,
        timed: bool = True,
    ):
        if isinstance(skeleton, PeftModel):
            adapter = skeleton.active_peft_config
        base: Any = skeleton.get_base_model() if isinstance(skeleton, PeftModel) else skeleton
        self.skeleton, self.dtype, self._timed = skeleton, getattr(torch, dtype), timed
        self._config, self._seeds = base.config, itertools.count()
        self.layers = int(base.config.get_text_config().num_hidden_layers)
        self.alone = Sharding(
            torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        )
        self.host = psutil.Process().memory_info().rss
        self.process = 0 if self.alone.device.type == "cuda" else self.host
        self.models = [self._model(layers, adapter, checkpointing) for layers in LAYERS]
        self.weights = (
            sum(parameter.shape.numel() for parameter in canonical_parameters(skeleton))
            * self.dtype.itemsize
        )

    def _model(
        self, layers: int, adapter: PeftConfig | None = None, checkpointing: bool = False
    ) -> nn.Module:
        small = copy.deepcopy(self._config)
        text = small.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        loader: Any = AutoModelForImageTextToText if reads_images(small) else AutoModelForCausalLM
        with torch.random.fork_rng(), self.alone.device:
            torch.manual_seed(next(self._seeds))  # else all would be drawn from one state
            base: Any = loader.from_config(small, dtype=self.dtype, trust_remote_code=False)
            if checkpointing:
                # transformers 5.24 renamed it, and warns of the old name
                enable = getattr(base, "activation_checkpointing_enable", None)
                (enable or base.gradient_checkpointing_enable)()
            model: nn.Module = (
                base if adapter is None else get_peft_model(base, copy.deepcopy(adapter))
            )
        return model.eval()

    def stored(self, place: Path) -> list[StoredModel]:
        """Both models as checkpoints, without the LoRA, of other random weights each time."""
        found = []
        for layers in LAYERS:
            cast(Any, self._model(layers)).save_pretrained(place / str(layers))
            found.append(StoredModel.open(str(place / str(layers))))
        return found

    def deltas(self, modules: Iterable[str], rank: int) -> list[dict[str, LowRankDelta]]:
        """Random deltas on the like of `modules` in every layer of both models."""
        kinds = {re.sub(r"\.\d+\.", ".*.", name, count=1) for name in modules}
        return [
            {
                name: LowRankDelta(
                    torch.randn(rank, shape[1]) * 1e-3, torch.randn(shape[0], rank) * 1e-3
                )
                for name, shape in matrix_shapes(canonical_modules(model)).items()
                if re.sub(r"\.\d+\.", ".*.", name, count=1) in kinds
            }
            for model in self.models
        ]

    def measure(self, run: Callable[[int], Any], on_host: bool = False) -> Measured:
        """Runs a step on both models (0 and 1), once to see its memory and then, in turn, for the
        time.
        """
        memory = [self._bytes(partial(run, index), on_host) for index in (0, 1)]
        if not self._timed:
            return Measured((0.0, 0.0), (memory[0], memory[1]))
        times = [
            [self._seconds(partial(run, index)) for index in (0, 1)] for _ in range(REPETITIONS)
        ]
        fast, slow = (min(pair[index] for pair in times) for index in (0, 1))
        return Measured((fast, slow), (memory[0], memory[1]))

    def measure_writing(
        self, write: Callable[[int, Path], None], output_dir: str | None, on_host: bool = False
    ) -> tuple[float, int, int]:
        """Seconds, transient bytes and bytes on disk of what `write` writes to a folder, on the
        disk of the output.
        """
        sizes = [0, 0]

        def run(index: int) -> None:
            with temporary_folder_beside(output_dir) as place:
                with atomic_directory(place / "out") as folder:
                    write(index, folder)
                sizes[index] = sum(
                    path.stat().st_size for path in place.rglob("*") if path.is_file()
                )

        cost = self.measure(run, on_host)
        # Each weight is made by itself: the largest one counts, however many there are.
        more, steps = self.layers - LAYERS[0], LAYERS[1] - LAYERS[0]
        disk = sizes[0] + more * (sizes[1] - sizes[0]) // steps
        return cost.at(self.layers)[0], max(cost.memory), disk

    def _bytes(self, run: Callable[[], Any], on_host: bool) -> int:
        if on_host or self.alone.device.type != "cuda":
            with _Allocations() as allocations:
                run()
            return allocations.peak
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    def _seconds(self, run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        if self.alone.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


class _Allocations(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, count: int) -> None:
        self._alive.discard(key)
        self._now -= count


@contextmanager
def temporary_folder_beside(output_dir: str | None) -> Iterator[Path]:
    """A folder on the disk that will be written to; never in one that is to be replaced.

    Raises:
        OutputError: Nothing can be written there.
    """
    beside = None if output_dir is None else nearest_folder(Path(output_dir).absolute().parent)
    with writing():
        folder = tempfile.TemporaryDirectory(dir=beside)
    with folder as place:
        yield Path(place)
