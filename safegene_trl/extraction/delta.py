"""`delta`: the plain weight difference between the aligned and the degraded model, truncated to one
rank.

    V_m = trunc_svd(W_m^aligned − W_m^degraded, r)

Where both are adapters on one base model, or one is an adapter on the other, `V_m = ΔW_m^aligned −
ΔW_m^degraded` is known by its factors: exact, and the base model is not read at all (SafeGene,
arXiv 2606.06519, starts from this difference).
"""

import zlib
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..checkpoints.row_blocks import RowReader, in_threads
from ..checkpoints.stored_model import StoredModel
from ..errors import CheckpointError, FamilyError
from ..models.experts import can_be_changed, matrix_shapes, task_matrices
from ..models.names import shared_parameter
from ..models.parameters import text_modules
from ..models.rounding import is_finite
from ..progress import bar_of
from .coverage import Coverage, differences, not_finite
from .svd import Truncation, factors_at_rank, truncated_svd


def adapter_delta(
    aligned: torch.nn.Module,
    degraded: torch.nn.Module,
    rank: int | None = None,
    experts: bool = True,
) -> dict[str, Truncation]:
    """The difference of the adapters on two models of one base model.

    Args:
        aligned: Plain, or with the aligning LoRA on it.
        degraded: Plain, or with the degrading LoRA on it.
        rank: Rank of the result; None keeps the LoRAs' own, the largest one where modules differ.
        experts: Whether experts that lie in one parameter are among them.

    Returns:
        By canonical module name.

    Raises:
        FamilyError: There is no difference.
        CheckpointError: An adapter holds NaN or infinity.
    """
    factors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for sign, model in ((1, aligned), (-1, degraded)):
        for name, pairs in task_matrices(model).items():
            if can_be_changed(name) and (experts or not shared_parameter(name)):
                factors.setdefault(name, []).extend((a, sign * b) for a, b in pairs)
    stacked = {
        name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        for name, pairs in factors.items()
    }
    if not stacked:
        raise FamilyError("The two models do not differ in any layer: give another degraded model.")
    for name, pair in stacked.items():
        if not all(map(is_finite, pair)):
            raise CheckpointError(
                f"A LoRA on `{name}` holds NaN or infinity: its training has diverged."
            )
    rank = rank or max(a.shape[0] for a, _ in stacked.values())
    return {name: factors_at_rank(a, b, rank) for name, (a, b) in stacked.items()}


@dataclass(frozen=True)
class _Cut:
    """How a difference is cut to its rank."""

    rank: int
    exact: bool
    seed: int


def stored_delta(
    aligned: StoredModel,
    degraded: StoredModel,
    rank: int,
    exact: bool = False,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, Truncation]:
    """`stored_difference` of the linear layers and experts alone: nothing else is read."""
    cut = _Cut(rank, exact, seed)
    return _difference(aligned, degraded, cut, show_progress, False, True)[0]


def stored_difference(
    aligned: StoredModel,
    degraded: StoredModel,
    rank: int,
    exact: bool = False,
    seed: int = 0,
    show_progress: bool = True,
    experts: bool = True,
) -> tuple[dict[str, Truncation], Coverage]:
    """The truncated difference of every linear layer and expert of two stored models, and how much
    of the whole difference that is.

    Every byte is read once; of each model one matrix per thread is in memory.

    Args:
        aligned: The aligned model.
        degraded: The degraded model, of the same names and shapes.
        rank: Rank r of every delta.
        exact: Take the exact SVD, which is some hundred times slower.
        seed: Of the randomised SVD.
        show_progress: Whether to show a progress bar.
        experts: Whether experts that lie in one parameter are among them.

    Returns:
        The differences by canonical module name, and their coverage.

    Raises:
        FamilyError: Names or shapes differ, or nothing else does.
        CheckpointError: A model holds NaN or infinity.
    """
    cut = _Cut(rank, exact, seed)
    return _difference(aligned, degraded, cut, show_progress, True, experts)


def _difference(
    aligned: StoredModel,
    degraded: StoredModel,
    cut: _Cut,
    show_progress: bool,
    whole: bool,
    experts: bool,
) -> tuple[dict[str, Truncation], Coverage]:
    names = _matrices(aligned, degraded, experts)
    pieces = {name: aligned.pieces(name) for name in names}
    sizes = [
        sum(piece.rows * aligned.files[piece.name].row_bytes for piece in own)
        for own in pieces.values()
    ]
    read = {piece.name for own in pieces.values() for piece in own}
    rest = {name: own for name, own in aligned.text_files.items() if whole and own not in read}
    total = 2 * (sum(sizes) + sum(aligned.files[own].num_bytes for own in rest.values()))
    bar = bar_of("Extracting", total, show_progress, unit="B", unit_scale=True)
    found: dict[str, Truncation] = {}
    with bar, RowReader() as reader:
        work = partial(_module_delta, aligned, degraded, reader, cut)
        for name, size, truncation in zip(names, sizes, in_threads(work, names), strict=True):
            found[name] = truncation
            bar.update(2 * size)
        left_out = differences(aligned, degraded, rest, reader, bar.update)
    coverage = Coverage(sum(truncation.squares for truncation in found.values()), left_out)
    if coverage.whole == 0:
        raise FamilyError("The two models do not differ in any layer: give another degraded model.")
    return found, coverage


def _matrices(aligned: StoredModel, degraded: StoredModel, experts: bool) -> list[str]:
    """The matrices to compare: all linear layers, and the experts that the files hold in a known
    form.
    """
    names = [
        name
        for name in matrix_shapes(text_modules(aligned.model))
        if can_be_changed(name)
        and (not shared_parameter(name) or (experts and aligned.pieces(name)))
    ]
    for name in names:
        # classes that wrap the text model have other names in their files
        shapes = [
            [
                (replace(piece, name=""), model.files[piece.name].shape)
                for piece in model.pieces(name)
            ]
            for model in (aligned, degraded)
        ]
        if not shapes[0] or shapes[0] != shapes[1]:
            raise FamilyError(
                f"`{name}` differs in shape between the aligned and the degraded model: use one family."
            )
    return names


@torch.no_grad()
def _module_delta(
    aligned: StoredModel,
    degraded: StoredModel,
    reader: RowReader,
    cut: _Cut,
    name: str,
) -> Truncation:
    difference = aligned.matrix(reader, name)
    difference -= degraded.matrix(reader, name)
    if not is_finite(difference):
        diverged = aligned if not is_finite(aligned.matrix(reader, name)) else degraded
        raise not_finite(diverged, name)
    seed = cut.seed + zlib.crc32(name.encode())
    return truncated_svd(difference, cut.rank, cut.exact, seed=seed)
