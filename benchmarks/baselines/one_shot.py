"""The one-shot patch (arXiv 2601.01887, “Safety at One Shot”): a fine-tuned model is trained for a
few epochs on one harmful prompt with its refusal.

    θ ← θ − η ∇ CE(refusal | prompt; θ),      a few times, on one and the same sample.

The paper's abstract says that one sample and a few epochs are enough. How the sample is chosen is
known here from summaries alone: of a pool of candidates the one whose patched model is nearest to
the aligned model on harmful prompts and to the fine-tuned one on the task. So are ten epochs and
plain fine-tuning at a rate of 2e-5.

Ours: the candidates are some of the vector's harmful prompts with the refusals that lie there; all
are tried, and the one with the lowest loss of the held-out shots (`held_out.py`) is kept, instead of
the two-level search. A LoRA in float32 is trained, at the usual higher rate: of full weights in
bfloat16 most steps of that size would be rounded away. It stops before the ten steps are over where
the refusal's loss has fallen below 0.1 nats per token, for then nothing is left to learn from it.
"""

from torch import nn

from safegene_trl.data.calibration import CalibrationSet
from safegene_trl.models.inputs import Sample

from . import Update
from .few_shot import RANK, adapter_updates, new_lora, training
from .held_out import held_out_loss, lowest


STEPS, RATE, ENOUGH, CANDIDATES = 10, 5e-4, 0.1, 4


def one_shot_update(
    model: nn.Module, shots: CalibrationSet, pad_id: int, seed: int = 0
) -> tuple[Update, dict[str, object]]:
    """What the patch adds to `model`: that of the candidate which does best on the held-out shots.

    Args:
        model: The fine-tuned model; its own layers and weights are back afterwards, frozen.
        shots: The first refusals that are not held out are the candidates.
        pad_id: Token to pad with.
        seed: Of the LoRA's start.

    Returns:
        The update (float32), and which `candidate` it is, its `steps` and the `held_out` loss of
        all.
    """
    patches = [
        patched(model, sample, shots, pad_id, seed) for sample in shots.harmful.fit[:CANDIDATES]
    ]
    losses = {index: loss for index, (*_, loss) in enumerate(patches)}
    best = lowest(losses)
    update, steps, _ = patches[best]
    held_out = [round(loss, 4) for loss in losses.values()]
    return update, {"candidate": best, "steps": steps, "held_out": held_out}


def patched(
    model: nn.Module, sample: Sample, shots: CalibrationSet, pad_id: int, seed: int
) -> tuple[Update, int, float]:
    """What one sample teaches, in how many steps, and the loss of the held-out shots after it."""
    with new_lora(model, RANK, seed) as tuned:
        steps = 0
        for loss in training(tuned, [sample], pad_id, STEPS, RATE):
            steps += 1
            if loss < ENOUGH:
                break
        return adapter_updates(tuned), steps, held_out_loss(tuned, shots, pad_id)
