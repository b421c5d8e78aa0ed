"""EnchTable (arXiv 2511.09880): a linearised safety vector, scaled by the norms and by the
interference of each matrix.

    α = β ‖τ‖ / ‖Δ‖,   β = 0.1,      ΔW ← ΔW + exp(−I) α Δ

with `I` the interference of the module's two matrices. The package offers the same rule (`safegene
apply --coefficients interference`); here it is applied to the update.
"""

from collections.abc import Mapping

from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.step.interference import interference_coefficients

from . import Update


def enchtable(update: Mapping[str, LowRankDelta], vector: Mapping[str, LowRankDelta]) -> Update:
    """The update with the vector added.

    Args:
        update: The fine-tune's update as factors.
        vector: `Δ` as factors, from an extraction with `method: linearized`.
    """
    coefficients = interference_coefficients(update, vector)
    return {
        name: delta.dense() + (coefficients[name] * vector[name].dense() if name in vector else 0.0)
        for name, delta in update.items()
    }
