"""EnchTable's interference-aware merge (arXiv 2511.09880): coefficients without data, from the
weights alone.

With `τ` the fine-tune's own change and `Δ` the safety vector,

    θ' = θ_t + w_m α Δ_m,   α = β ‖τ‖ / ‖Δ‖ over all modules,   w_m = exp(−I_m),   I_m = 200 · mean |M_m|
    M = (UᵀU − 1) Σ (VᵀV − 1),   U = [U_τ, U_Δ],  V = [V_τ, V_Δ],  Σ = diag(S_τ, S_Δ)

of the two SVDs per module. `U_τ`, `U_Δ`, … have orthonormal columns, so with `C = U_τᵀ U_Δ` and `D
= V_τᵀ V_Δ` the matrix `M` has only the blocks `C S_Δ Dᵀ` and `Cᵀ S_τ D` on its diagonal, and the
full product is never formed. `I` grows with the scale of the weights: the same two changes in other
units get another weight.
"""

import math
from collections.abc import Mapping

import torch

from ..errors import FamilyError
from ..extraction.svd import svd_of_product
from ..models.low_rank import LowRankDelta


BETA = 0.1
SHARPNESS = 200.0


def interference(task: LowRankDelta, vector: LowRankDelta) -> float:
    """`mean |M|` of one module, over the singular vectors of both changes whose values are more
    than rounding.
    """
    (u_task, s_task, v_task), (u_vector, s_vector, v_vector) = (
        _svd(delta) for delta in (task, vector)
    )
    c, d = u_task.T @ u_vector, v_task.T @ v_vector
    blocks = (c * s_vector) @ d.T, (c.T * s_task) @ d
    return float(sum(block.abs().sum() for block in blocks)) / (len(s_task) + len(s_vector)) ** 2


def interference_coefficients(
    tasks: Mapping[str, LowRankDelta], vectors: Mapping[str, LowRankDelta], beta: float = BETA
) -> dict[str, float]:
    """The coefficient `w_m α` of every module of a vector.

    Args:
        tasks: The fine-tune's change by canonical module name; a module that it leaves alone may be
            missing.
        vectors: The safety vector.
        beta: β.

    Raises:
        FamilyError: The fine-tune changes nothing.
    """
    task_norm, vector_norm = (
        math.sqrt(sum(delta.inner(delta) for delta in each.values())) for each in (tasks, vectors)
    )
    if task_norm == 0 or vector_norm == 0:
        raise FamilyError(
            "The fine-tune or the safety vector changes no weight: there is no interference to weigh."
        )
    scale = beta * task_norm / vector_norm
    return {
        name: scale
        * (math.exp(-SHARPNESS * interference(tasks[name], vector)) if name in tasks else 1.0)
        for name, vector in vectors.items()
    }


def _svd(delta: LowRankDelta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`U` (d_out×k), `S` (k) and `V` (d_in×k) of `B A`, in float64, without the singular values
    that are rounding.

    They count: `M` has an entry for each of their vectors, whatever the size of the value.
    """
    u, s, vh = svd_of_product(delta.a.double(), delta.b.double())
    kept = int((s > s[0] * 1e-4).sum())
    return u[:, :kept], s[:kept], vh[:kept].T
