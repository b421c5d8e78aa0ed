"""The plain alternative with its two settings chosen as well as the shots allow: how long, and at
which rate.

A LoRA is trained on the shots that are not held out, once at every rate, and measured on the others
after every number of steps. The rate and the number of steps with the lowest loss there

    CE(refusals) + CE(benign answers) + CE(task answers)

(`held_out.py`) then train a new one on all shots. It reads what recalibration reads and no more.
"""

from collections.abc import Sequence

from torch import nn

from safegene_trl.data.calibration import CalibrationSet
from safegene_trl.models.inputs import Sample

from . import Update
from .few_shot import RANK, few_shot_update, new_lora, training
from .held_out import held_out_loss, lowest


STEPS = (10, 30, 60)
RATES = (1e-4, 2e-4, 5e-4, 1e-3)


def tuned_few_shot_update(
    model: nn.Module,
    shots: CalibrationSet,
    pad_id: int,
    steps: Sequence[int] = STEPS,
    rates: Sequence[float] = RATES,
    seed: int = 0,
) -> tuple[Update, dict[str, object]]:
    """What the LoRA adds to `model`, and the setting it was trained with.

    Args:
        model: The fine-tuned model; its own layers and weights are back afterwards, frozen.
        shots: All of the shots.
        pad_id: Token to pad with.
        steps: Numbers of steps to choose from.
        rates: Learning rates to choose from.
        seed: Of every training.

    Returns:
        The update (float32), and `steps`, `learning_rate` and every pair's loss in `held_out`.
    """
    losses = {
        (count, rate): loss
        for rate in rates
        for count, loss in losses_by_steps(model, shots, pad_id, steps, rate, seed).items()
    }
    count, rate = lowest(losses)
    update = few_shot_update(model, shots, pad_id, steps=count, learning_rate=rate, seed=seed)
    grid = {f"{n} steps at {r:g}": round(loss, 4) for (n, r), loss in losses.items()}
    return update, {"steps": count, "learning_rate": rate, "held_out": grid}


def losses_by_steps(
    model: nn.Module,
    shots: CalibrationSet,
    pad_id: int,
    steps: Sequence[int],
    rate: float,
    seed: int,
) -> dict[int, float]:
    """The loss of the held-out shots after each number of steps of one training on the others."""
    samples: list[Sample] = []
    for split in (shots.harmful, shots.task, shots.benign):
        samples += split.fit if split is not None else []
    found = {}
    with new_lora(model, RANK, seed) as tuned:
        for done, _ in enumerate(training(tuned, samples, pad_id, max(steps), rate), 1):
            if done in steps:
                found[done] = held_out_loss(tuned, shots, pad_id)
    return found
