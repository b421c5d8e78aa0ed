"""`orthogonal` isolation: what a safety vector shares with the family's own tasks is taken out of
it.

Per module, with `U_k` and `W_k` the leading k left and right singular vectors of the task deltas
`T_1 … T_K` put side by side, and on top of each other:

    V' = V − U_k U_kᵀ V W_k W_kᵀ

which removes the component that lies in the tasks' row and column space at once, and is cut back to
V's rank. It is the separation of safety from task directions that a vector taken from one
degradation does not have by itself.
"""

from collections.abc import Mapping, Sequence

import torch

from ..errors import ConfigError
from ..models.low_rank import LowRankDelta
from .svd import Truncation, factors_at_rank


def isolated(
    deltas: Mapping[str, LowRankDelta], tasks: Sequence[Mapping[str, LowRankDelta]], rank: int
) -> tuple[dict[str, Truncation], dict[str, float]]:
    """A vector without its component in the tasks' subspace.

    Args:
        deltas: The vector, by canonical module name.
        tasks: Deltas of fine-tunes of the aligned model. A module that no task changes stays as it
            is.
        rank: k, the dimension of the tasks' subspace; at most the tasks' ranks together.

    Returns:
        The new deltas at their old rank, and the share (0–1) of `‖V_m‖²` that was removed.
    """
    if rank < 1:
        raise ConfigError(f"`isolation_rank` is {rank}: it must be at least 1.")
    found, removed = {}, {}
    for name, delta in deltas.items():
        a, b = delta.a.float(), delta.b.float()
        parts = [task[name] for task in tasks if name in task]
        if parts:
            left = _leading([(part.b.float(), part.a.float()) for part in parts], rank)
            right = _leading([(part.a.float().T, part.b.float().T) for part in parts], rank)
            shared_b, shared_a = left @ (left.T @ b), (a @ right) @ right.T
            shared = LowRankDelta(shared_a, shared_b)
            removed[name] = shared.inner(shared) / max(delta.inner(delta), 1e-30)
            a, b = torch.cat([a, shared_a]), torch.cat([b, -shared_b], dim=1)
        else:
            removed[name] = 0.0
        found[name] = factors_at_rank(a, b, delta.a.shape[0])
    return found, removed


def _leading(products: Sequence[tuple[torch.Tensor, torch.Tensor]], rank: int) -> torch.Tensor:
    """The leading left singular vectors of `[L_1 R_1, L_2 R_2, …]`, as orthonormal columns."""
    basis, core = torch.linalg.qr(torch.cat([left for left, _ in products], dim=1))
    blocks, column = [], 0
    for left, right in products:
        # Only the right factor's triangle matters for left singular vectors.
        triangle = torch.linalg.qr(right.T).R
        blocks.append(core[:, column : column + left.shape[1]] @ triangle.T)
        column += left.shape[1]
    u, s, _ = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    count = min(rank, int((s > s[0] * 1e-6).sum()))
    return basis @ u[:, :count]
