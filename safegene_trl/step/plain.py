"""The plain fine-tune on disk before the safety step begins: whatever happens in the step, the training is not lost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from ..merging import save_merged
from ..output import writing
from ..sharding import Sharding


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


@dataclass
class FinishedTraining:
    """A training at its end.

    Attributes:
        saved_step: The step of its last checkpoint, None where it has saved none.
        trainer: Saves as it would itself; without it this package does.
    """

    args: TrainingArguments
    state: TrainerState
    saved_step: int | None = None
    trainer: Trainer | None = None

    def keep(self, model: nn.Module, processor: Any, sharding: Sharding) -> Path:
        """Collective: where the fine-tune lies; saved to `output_dir` if no checkpoint of the training holds it.

        `trainer.save_model()` afterwards writes the same files to the same place: no more disk is needed than for that.

        Args:
            model: The live fine-tune.
            processor: Its tokenizer, or the processor that holds it.
            sharding: How the model is spread over ranks.

        Raises:
            OutputError: It cannot be written.
        """
        if found := sharding.text_from_main(self._checkpoint() if sharding.is_main else ""):
            return Path(found)
        folder = Path(str(self.args.output_dir))
        before = _written(folder)
        if self.trainer is not None:
            with writing():
                self.trainer.save_model(str(folder), _internal_call=True)  # else it would push to the hub
        saved = sharding.is_main and _written(folder) != before
        if not sharding.text_from_main("yes" if saved else ""):  # FSDP with sharded states saves nothing
            _save(model, processor, folder, sharding)
        return folder

    def _checkpoint(self) -> str:
        """The training's own checkpoint that holds the live weights; empty where there is none."""
        place = None
        if self.args.load_best_model_at_end:
            place = self.state.best_model_checkpoint
        elif self.saved_step == self.state.global_step:
            place = str(Path(str(self.args.output_dir)) / f"checkpoint-{self.saved_step}")
        if place is None or not (_written(Path(place)) or (Path(place) / "latest").is_file()):
            return ""
        return place


def _written(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every weight file that a fine-tune is read from."""
    found = [folder / name for name in _WEIGHTS]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()]


def _save(model: nn.Module, processor: Any, folder: Path, sharding: Sharding) -> None:
    with sharding.agreed(), writing():
        if sharding.is_main:
            folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, PeftModel):
        with sharding.agreed(), writing():
            if sharding.is_main:
                for name in _WEIGHTS:  # of an earlier run
                    (folder / name).unlink(missing_ok=True)
        save_merged(model, {}, {}, processor, folder, "50GB", sharding)
        return
    whole = {}
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            with sharding.full([tensor]) as (full,):
                if sharding.is_main:
                    whole[name] = full.detach().cpu().clone()
    with sharding.agreed(), writing():
        if sharding.is_main:
            model.save_pretrained(str(folder), state_dict=whole or None)
            processor.save_pretrained(folder)
