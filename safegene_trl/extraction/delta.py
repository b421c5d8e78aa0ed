"""`delta`: the plain weight difference between the aligned and the degraded model, truncated to one rank.

    V_m = trunc_svd(W_m^aligned − W_m^degraded, r)

Where both are adapters on one base model, or one is an adapter on the other, `V_m = ΔW_m^aligned − ΔW_m^degraded` is known by its
factors: exact, and the base model is not read at all (SafeGene, arXiv 2606.06519, starts from this difference).
"""

import zlib
from functools import partial

import torch
from tqdm.auto import tqdm

from ..errors import FamilyError
from ..streaming import RowReader, StoredModel, in_threads
from ..weights import canonical_modules, layer_index, linear_shape, task_factors
from .svd import Truncation, factors_at_rank, truncated_svd


def adapter_delta(
    aligned: torch.nn.Module, degraded: torch.nn.Module, rank: int | None = None
) -> dict[str, Truncation]:
    """The difference of the adapters on two models of one base model.

    Args:
        aligned: Plain, or with the aligning LoRA on it.
        degraded: Plain, or with the degrading LoRA on it.
        rank: Rank of the result; None keeps the LoRAs' own, the largest one where modules differ.

    Returns:
        By canonical module name.
    """
    factors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for sign, model in ((1, aligned), (-1, degraded)):
        for name, module in canonical_modules(model).items():
            if layer_index(name) is not None:
                factors.setdefault(name, []).extend((a, sign * b) for a, b in (f.pair() for f in task_factors(module)))
    stacked = {
        name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        for name, pairs in factors.items()
        if pairs
    }
    if not stacked:
        raise FamilyError("The two models do not differ in any layer: give another degraded model.")
    rank = rank or max(a.shape[0] for a, _ in stacked.values())
    return {name: factors_at_rank(a, b, rank) for name, (a, b) in stacked.items()}


def stored_delta(
    aligned: StoredModel,
    degraded: StoredModel,
    rank: int,
    exact: bool = False,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, Truncation]:
    """The truncated difference of every linear layer of two stored models.

    Every byte is read once; of each model one matrix per thread is in memory.

    Args:
        aligned: The aligned model.
        degraded: The degraded model, of the same names and shapes.
        rank: Rank r of every delta.
        exact: Take the exact SVD, which is some hundred times slower.
        seed: Of the randomised SVD.
        show_progress: Whether to show a progress bar.

    Returns:
        By canonical module name.

    Raises:
        FamilyError: Names or shapes differ.
    """
    names = [
        name
        for name, module in canonical_modules(aligned.model).items()
        if layer_index(name) is not None and linear_shape(module) is not None
    ]
    for name in names:
        stored = [model.files.get(model.weight_files.get(name, "")) for model in (aligned, degraded)]
        if stored[0] is None or stored[1] is None or stored[0].shape != stored[1].shape:
            raise FamilyError(f"`{name}` differs in shape between the aligned and the degraded model: use one family.")
    sizes = [aligned.files[aligned.weight_files[name]].num_bytes for name in names]
    bar = tqdm(total=2 * sum(sizes), desc="Extracting", unit="B", unit_scale=True, disable=not show_progress)
    found: dict[str, Truncation] = {}
    with bar, RowReader() as reader:
        work = partial(_module_delta, aligned, degraded, reader, rank, exact, seed)
        for name, size, truncation in zip(names, sizes, in_threads(work, names), strict=True):
            found[name] = truncation
            bar.update(2 * size)
    if all(truncation.delta.b.count_nonzero() == 0 for truncation in found.values()):
        raise FamilyError("The two models do not differ in any layer: give another degraded model.")
    return found


@torch.no_grad()
def _module_delta(
    aligned: StoredModel, degraded: StoredModel, reader: RowReader, rank: int, exact: bool, seed: int, name: str
) -> Truncation:
    difference = aligned.matrix(reader, name)
    difference -= degraded.matrix(reader, name)
    return truncated_svd(difference, rank, exact, seed=seed + zlib.crc32(name.encode()))
