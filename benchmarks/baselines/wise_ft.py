"""WiSE-FT (arXiv 2109.01903): the weights halfway between the aligned model and its fine-tune.

    θ = θ_aligned + α (θ_t − θ_aligned)

so the update is scaled by α. The paper finds α = 0.5 good without a choice; here it can also be
chosen by the loss of the held-out shots (`held_out.py`).
"""

from collections.abc import Callable

from . import Update
from .held_out import lowest


GRID = (0.25, 0.5, 0.75, 1.0)


def wise_ft(update: Update, alpha: float) -> Update:
    """The update scaled by `alpha` (0–1)."""
    return {name: alpha * matrix for name, matrix in update.items()}


def chosen_wise_ft(
    update: Update, loss: Callable[[Update], float]
) -> tuple[Update, dict[str, object]]:
    """The update scaled by the α of the grid whose model has the lowest loss.

    Args:
        update: `ΔW` of the fine-tune.
        loss: Of the aligned model with an update.

    Returns:
        The update, and `alpha` and the loss of every α in `held_out`.
    """
    losses = {alpha: loss(wise_ft(update, alpha)) for alpha in GRID}
    alpha = lowest(losses)
    about = {str(each): round(value, 4) for each, value in losses.items()}
    return wise_ft(update, alpha), {"alpha": alpha, "held_out": about}
