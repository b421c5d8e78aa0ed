"""`delta`: the plain weight difference between the aligned and the degraded model, truncated to one rank.

    V_m = trunc_svd(W_m^aligned − W_m^degraded, r)

If the degraded model is a LoRA on the aligned one, `V_m = −ΔW_m` exactly and no SVD of a dense matrix is needed
(SafeGene, arXiv 2606.06519, starts from this difference).
"""

import torch
import torch.nn.functional as F
from peft import PeftModel

from ..attach import LowRankDelta
from ..errors import FamilyError
from ..weights import canonical_modules, canonical_parameters, is_transposed, layer_index, linear_shape, task_factors


def lora_delta(degraded: PeftModel, rank: int | None = None) -> tuple[dict[str, LowRankDelta], dict[str, float]]:
    """The negated LoRA of a degraded model that was trained as a LoRA on the aligned one.

    Args:
        degraded: The aligned model with the degrading LoRA on it.
        rank: Rank of the result; None keeps the LoRA's own, the largest one where modules differ.

    Returns:
        Deltas by canonical module name (float32), and the share of `‖ΔW‖_F²` kept for each.
    """
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in canonical_modules(degraded).items():
        pairs = [factors.pair() for factors in task_factors(module)]
        if pairs and layer_index(name) is not None:
            found[name] = torch.cat([a for a, _ in pairs]), -torch.cat([b for _, b in pairs], dim=1)
    if not found:
        raise FamilyError("The degraded model's LoRA changes no layer: give another degraded model.")
    rank = rank or max(a.shape[0] for a, _ in found.values())
    deltas, energy = {}, {}
    for name, (a, b) in found.items():
        deltas[name], energy[name] = _at_rank(a, b, rank)
    return deltas, energy


def dense_delta(
    aligned: torch.nn.Module, degraded: torch.nn.Module, rank: int
) -> tuple[dict[str, LowRankDelta], dict[str, float]]:
    """Truncated SVD of every linear layer's weight difference, one module at a time, in float32.

    Args:
        aligned: The aligned model, plain.
        degraded: The degraded model, plain, of the same names and shapes.
        rank: Rank r of every delta.

    Returns:
        Deltas by canonical module name (float32), and the share of `‖ΔW‖_F²` kept for each.
    """
    others = {parameter.name: parameter for parameter in canonical_parameters(degraded)}
    deltas, energy = {}, {}
    for parameter in canonical_parameters(aligned):
        name = parameter.module_name
        if (
            layer_index(name) is None
            or linear_shape(parameter.module) is None
            or not parameter.name.endswith(".weight")
        ):
            continue
        if parameter.name not in others or others[parameter.name].tensor.shape != parameter.tensor.shape:
            raise FamilyError(
                f"`{parameter.name}` differs between the aligned and the degraded model: use one family."
            )
        difference = parameter.tensor.detach().float() - others[parameter.name].tensor.detach().float()
        if is_transposed(parameter.module):
            difference = difference.T
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        deltas[name] = _balanced(u[:, :rank], s[:rank], vh[:rank])
        energy[name] = _kept(s, rank)
    return deltas, energy


def _at_rank(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[LowRankDelta, float]:
    """`B A` at a given rank: padded with zeros up to it, or cut down to it by an SVD of the small core."""
    missing = rank - a.shape[0]
    if missing >= 0:
        return LowRankDelta(F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))), 1.0
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    return _balanced(q_b @ u[:, :rank], s[:rank], vh[:rank] @ q_a.T), _kept(s, rank)


def _balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> LowRankDelta:
    root = s.sqrt()
    return LowRankDelta((root[:, None] * vh).contiguous(), (u * root).contiguous())


def _kept(singular_values: torch.Tensor, rank: int) -> float:
    total = float(singular_values.square().sum())
    return float(singular_values[:rank].square().sum()) / total if total > 0 else 1.0
