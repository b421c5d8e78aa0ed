"""The plain fine-tune on disk before the safety step begins: whatever happens in the step, the
training is not lost.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, Trainer, TrainerState, TrainingArguments

from ..checkpoints.checkpoint_folder import CheckpointFolder
from ..checkpoints.live_merge import save_merged
from ..checkpoints.loading import stored_vocabulary
from ..checkpoints.merge_terms import NO_VECTOR
from ..checkpoints.write_errors import writing
from ..checkpoints.zero_shards import holds_only_zero_shards
from ..distributed.layouts import Sharding
from ..errors import OutputError
from ..models.parameters import adapter_configs, base_model, vocabulary_rows
from ..models.supported import check_held
from ..text import one_line


_LOOKED_AT = 8  # numbers of a tensor, at least, by which it is known again
_FULL = ("model.safetensors", "model.safetensors.index.json")
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class _LeftOut(GenerationConfig):
    """In the place of a generation config that transformers refuses to save: writes nothing."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        return


@dataclass
class FinishedTraining:
    """A training at its end.

    Attributes:
        saved: What the weights were (see `fingerprint`) when it saved a checkpoint, by the step.
        trainer: Saves as it would itself; without it this package does.
    """

    args: TrainingArguments
    state: TrainerState
    saved: Mapping[int, torch.Tensor] = field(default_factory=dict)
    trainer: Trainer | None = None

    def keep(
        self, model: nn.Module, processor: Any, sharding: Sharding, loadable: bool = False
    ) -> str:
        """Collective: where the fine-tune lies; saved to `output_dir` if no checkpoint of the
        training holds it.

        `trainer.save_model()` afterwards writes the same files to the same place: no more disk is
        needed than for that. PEFT puts an adapter that is not called `default` into a folder of its
        name; of several that act together all are named.

        Args:
            model: The live fine-tune.
            processor: Its tokenizer, or the processor that holds it.
            sharding: How the model is spread over ranks.
            loadable: Whether transformers must be able to load it: a checkpoint of DeepSpeed's own
                shards will not do.

        Raises:
            OutputError: It cannot be written.
        """
        place = self._last_checkpoint()
        if place is not None and self._has_changed(model, place, sharding):
            place = None
        if found := sharding.broadcast_text(
            _holding(model, place, loadable) if sharding.is_main and place else ""
        ):
            return _named(model, Path(found))
        folder = Path(str(self.args.output_dir))
        places = _places(model, folder)
        before = [_written(model, place) for place in places]
        with _savable(model):
            if self.trainer is not None:
                with writing():
                    # else it would push to the hub
                    self.trainer.save_model(str(folder), _internal_call=True)
            after = [_written(model, place) for place in places]
            saved = sharding.is_main and all(
                new != old for new, old in zip(after, before, strict=True)
            )
            # FSDP with sharded states saves nothing
            if not sharding.broadcast_text("yes" if saved else ""):
                _save(model, processor, folder, sharding)
        return _named(model, folder)

    def _last_checkpoint(self) -> Path | None:
        """The training's own checkpoint of its end, None where it has saved none then."""
        if self.args.load_best_model_at_end:
            best = self.state.best_model_checkpoint
            return None if best is None else Path(best)
        step = self.state.global_step
        return (
            Path(str(self.args.output_dir)) / f"checkpoint-{step}" if step in self.saved else None
        )

    def _has_changed(self, model: nn.Module, place: Path, sharding: Sharding) -> bool:
        """Collective: whether the weights are others than when this checkpoint was saved, as those
        are that another callback averages when the training ends. Of a checkpoint from before the
        training was resumed that is not known, and counts as changed.
        """
        step = place.name.rpartition("-")[2]
        before = self.saved.get(int(step)) if step.isdigit() else None
        now = fingerprint(model, sharding)
        changed = before is None or not torch.allclose(before, now, 0, 0, equal_nan=True)
        return bool(sharding.sum(torch.tensor([int(changed)])).item())


@torch.no_grad()
def fingerprint(model: nn.Module, sharding: Sharding) -> torch.Tensor:
    """By which weights that were changed are told from those that were saved: of every trained
    tensor, or of this rank's shard of it, the sum and a few numbers; float32, on the CPU.
    """
    found = [torch.empty(0)]
    for part in sharding.trained_parts(model):
        few = part.flatten()[:: max(part.numel() // _LOOKED_AT, 1)].float()
        found += [few.cpu(), part.sum(dtype=torch.float32).reshape(1).cpu()]
    return torch.cat(found)


def _holding(model: nn.Module, place: Path, loadable: bool) -> str:
    """The checkpoint if the fine-tune lies in it whole, else an empty text."""
    if not adapter_configs(model) and (place / _ADAPTER_CONFIG).is_file():
        return ""  # what an earlier training has left there would be read in the place of the full fine-tune
    written = all(_written(model, part) for part in _places(model, place))
    shards = not loadable and holds_only_zero_shards(place)
    return str(place) if written or shards else ""


def check_finished(model: nn.Module, saves_config: bool) -> None:
    """Raises for what only the end of a training shows, after its fine-tune was kept.

    Args:
        model: The live fine-tune.
        saves_config: Whether the generation config belongs to what is saved, as it does not to an
            adapter.

    Raises:
        UnsupportedModelError: The adapter was merged, or more was trained than PEFT saves.
        OutputError: transformers refuses to save the generation config.
    """
    check_held(model)
    if saves_config and (reason := _refused(base_model(model).generation_config)):
        raise OutputError(
            f"transformers refuses to save the model's generation config ({reason}): correct it, then run `safegene apply` "
            "on the saved fine-tune."
        )


def _refused(config: GenerationConfig | None) -> str:
    """Why transformers refuses to save a generation config; empty where it does not."""
    with suppress(OSError), tempfile.TemporaryDirectory() as folder:  # a full disk is no refusal
        try:
            if config is not None:
                config.save_pretrained(folder)
        except ValueError as error:
            return one_line(error).rstrip(".")
    return ""


@contextmanager
def _savable(model: nn.Module) -> Iterator[None]:
    """While open, a generation config that transformers refuses to save is left out: it must not
    keep back the weights.
    """
    base = base_model(model)
    config = base.generation_config
    try:
        if _refused(config):
            base.generation_config = _LeftOut()
        yield
    finally:
        base.generation_config = config


def _places(model: nn.Module, folder: Path) -> list[Path]:
    """The folders in which a fine-tune saved to `folder` lies: that itself, or one for each active
    adapter with a name.
    """
    if not isinstance(model, PeftModel):
        return [folder]
    return [folder if name == "default" else folder / name for name in model.active_adapters]


def _named(model: nn.Module, folder: Path) -> str:
    return " and ".join(map(str, _places(model, folder)))


def _written(model: nn.Module, folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every weight file that a fine-tune is read from."""
    found = [folder / name for name in ((_ADAPTER,) if adapter_configs(model) else _FULL)]
    return [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in found
        if path.is_file()
    ]


def _save(model: nn.Module, processor: Any, folder: Path, sharding: Sharding) -> None:
    with sharding.raising_together(), writing():
        if sharding.is_main:
            folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, PeftModel):
        with sharding.raising_together(), writing():
            if sharding.is_main:
                for name in (*_FULL, _ADAPTER):  # of an earlier run
                    (folder / name).unlink(missing_ok=True)
        save_merged(model, NO_VECTOR, CheckpointFolder(folder, processor, "50GB"), sharding)
        return
    whole = {}
    base = model.active_peft_config.base_model_name_or_path
    resized = stored_vocabulary(base) not in (None, vocabulary_rows(model))
    embeddings = _embeddings(model) if resized else set()
    # tied weights under all of their names: PEFT asks for each
    for name, tensor in model.named_parameters(remove_duplicate=False):
        # a frozen adapter may act beside the trained one
        if tensor.requires_grad or ".lora_" in name or id(tensor) in embeddings:
            with sharding.full([tensor]) as (full,):
                if sharding.is_main:
                    whole[name] = full.detach().cpu().clone()
    with sharding.raising_together(), writing():
        if sharding.is_main:
            layers: Any = True if resized else "auto"
            model.save_pretrained(
                str(folder), state_dict=whole or None, save_embedding_layers=layers
            )
            processor.save_pretrained(folder)


def _embeddings(model: nn.Module) -> set[int]:
    """The identities of the input and the output embedding's tensors."""
    base = base_model(model)
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    return {id(tensor) for layer in layers if layer is not None for tensor in layer.parameters()}
