"""SaLoRA (arXiv 2501.01765): a LoRA whose output cannot point into the directions that safety uses.
It replaces the training.

With `V_s` (d_out×k) the first right singular vectors of `X_s Wᵀ`, `X_s` the module's inputs on the
responses of safety data,

    y = W x + C (B A − B₀ A₀) x,     C = I − V_s V_sᵀ .

The start is the weight's own singular vectors, `W ≈ U_r S_r Z_rᵀ`, their outputs within the
directions that the task uses,

    A₀ = S_r^½ Z_rᵀ,     B₀ = V_t V_tᵀ U_r S_r^½,

`V_t` as `V_s` on responses of the task's data; subtracting it leaves the model as it was. The
result is a LoRA of rank 2r. Start, scale 1 and modules are those of the authors' code
(github.com/homles11/SaLoRA).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .moments import output_directions


def safety_basis(weight: torch.Tensor, moment: torch.Tensor, rank: int = 32) -> torch.Tensor:
    """`V_s`, d_out×rank, of a module with weights `W` and the second moment `X_sᵀ X_s` (d_in×d_in)
    of its inputs.
    """
    return output_directions(weight, moment)[0][:, :rank].contiguous()


def task_start(
    weight: torch.Tensor, moment: torch.Tensor, rank: int, directions: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """`A₀` (rank×d_in) and `B₀` (d_out×rank) from the moment of the module's inputs on the task's
    data.
    """
    basis = output_directions(weight, moment)[0][:, :directions]
    u, s, zh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * zh[:rank], basis @ (basis.T @ (u[:, :rank] * root))


class SaLoRALinear(nn.Module):
    """A frozen linear layer with a SaLoRA beside it, float32 whatever the layer's own type.

    Args:
        base: The layer.
        basis: `V_s`.
        a: `A₀`.
        b: `B₀`.
    """

    def __init__(self, base: nn.Linear, basis: torch.Tensor, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.register_buffer("basis", basis)
        self.register_buffer("a_start", a.clone())
        self.register_buffer("b_start", b.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, x = self.base(x), x.to(self.a.dtype)
        change = F.linear(F.linear(x, self.a), self.b) - F.linear(
            F.linear(x, self.a_start), self.b_start
        )
        return y + (change - (change @ self.basis) @ self.basis.T).to(y.dtype)

    @torch.no_grad()
    def update(self) -> torch.Tensor:
        """`ΔW`, d_out×d_in."""
        change = self.b @ self.a - self.b_start @ self.a_start
        return change - self.basis @ (self.basis.T @ change)


def insert(
    model: nn.Module,
    safety: Mapping[str, torch.Tensor],
    task: Mapping[str, torch.Tensor],
    rank: int,
) -> dict[str, SaLoRALinear]:
    """Puts a SaLoRA on every module of `safety` (its moments, as `task` has them) and freezes the
    rest of the model.
    """
    model.requires_grad_(False)
    found = {}
    for name, moment in safety.items():
        base = model.get_submodule(name)
        weight = base.weight.detach()
        layer = SaLoRALinear(
            base, safety_basis(weight, moment), *task_start(weight, task[name], rank)
        )
        model.set_submodule(name, layer)
        found[name] = layer
    return found
