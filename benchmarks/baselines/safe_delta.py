"""Safe Delta (arXiv 2505.12038): entries of the update that cost safety are left out, and the loss
of the others made good.

With `H = X Xᵀ / n + damping` of the inputs `X` of a module on safety data (harmful prompts with
refusals), a change `d` of one row of the weights costs `½ dᵀ H d` of safety. An entry `δ_j` taken
alone, with the rest free to make up for it, costs `δ_j² / (2 [H⁻¹]_jj)` and brings utility in
proportion to `δ_j²`: so columns are taken in the order of `[H⁻¹]_jj` until the budget is spent. The
entries left out are then not 0 but what costs least beside those taken (optimal brain surgeon):

    d_R = −H_RR⁻¹ H_RS d_S .

The paper adds the corrections of single entries up; this is their exact sum.
"""

from collections.abc import Mapping

import torch

from . import Update


DAMPING = 0.01  # of the mean diagonal of H


def safe_delta(update: Update, moments: Mapping[str, torch.Tensor], budget: float = 0.1) -> Update:
    """The update with the costly columns replaced.

    Args:
        update: `ΔW` of the fine-tune.
        moments: `X Xᵀ / n` (d_in×d_in) of every module's inputs on safety data.
        budget: Share (0–1) of the whole update's cost that the entries taken may cost.
    """
    inverse_diagonals, costs = {}, {}
    for name, matrix in update.items():
        inverse_diagonals[name] = torch.linalg.inv(damped(moments[name])).diagonal()
        # of each column, over all rows
        costs[name] = (matrix**2).sum(dim=0) / (2 * inverse_diagonals[name])
    names = list(update)
    owner = torch.cat([torch.full_like(costs[name], i) for i, name in enumerate(names)])
    order = torch.cat([inverse_diagonals[name] for name in names]).argsort(descending=True)
    cost = torch.cat([costs[name] for name in names])[order].double()
    taken = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    taken[order[cost.cumsum(0) <= budget * cost.sum()]] = True
    return {
        name: compensated(update[name], moments[name], taken[owner == i])
        for i, name in enumerate(names)
    }


def compensated(matrix: torch.Tensor, moment: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """The columns `taken` (bool, d_in) as they are, the others at the least cost beside them."""
    hessian, found = damped(moment), torch.zeros_like(matrix)
    found[:, taken] = matrix[:, taken]
    if taken.any() and not taken.all():
        inner = torch.linalg.solve(hessian[~taken][:, ~taken], hessian[~taken][:, taken])
        found[:, ~taken] = -matrix[:, taken] @ inner.T
    return found


def damped(moment: torch.Tensor) -> torch.Tensor:
    """`H`: the moment with a little of its mean diagonal added to the diagonal."""
    eye = torch.eye(len(moment), device=moment.device)
    return moment + DAMPING * moment.diagonal().mean() * eye
