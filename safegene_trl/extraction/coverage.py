"""How much of the difference of two models lies in the modules that a safety vector can hold.

A vector has deltas for linear layers and experts. What a degradation changed elsewhere (embeddings, norms, the
output head; with methods that distil, experts that lie in one parameter) is left out of it. With `D_m` the
difference of module or tensor m, the covered share is `Σ_covered ‖D_m‖² / Σ_all ‖D_m‖²`, in squared
Frobenius norms.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ..checkpoints.row_blocks import Block, RowReader, in_threads, row_blocks
from ..checkpoints.stored_model import StoredModel
from ..errors import CheckpointError, FamilyError
from ..models.experts import task_matrices
from ..models.rounding import is_finite
from .svd import Truncation, factors_at_rank


FLOOR = 0.01  # share below which a vector is no picture of the difference
HALF = 0.5
_SHOWN = 3


@dataclass(frozen=True)
class Coverage:
    """What of a difference a vector's modules hold.

    Attributes:
        covered: Squared Frobenius norm of the difference in those modules.
        left_out: The same of everything else that differs, by name.
    """

    covered: float
    left_out: Mapping[str, float]

    @property
    def whole(self) -> float:
        """Squared Frobenius norm of the whole difference."""
        return self.covered + sum(self.left_out.values())

    @property
    def share(self) -> float:
        """The covered share (0–1); 1 where nothing differs."""
        return self.covered / self.whole if self.whole else 1.0

    def check(self) -> str | None:
        """What is to be said about a difference that lies mostly elsewhere, None where it does not.

        Raises:
            FamilyError: Nearly all of it does.
        """
        largest = sorted(self.left_out, key=lambda name: -self.left_out[name])[:_SHOWN]
        names = ", ".join(f"`{name}`" for name in largest)
        found = f"The linear layers that a vector can change hold {100 * self.share:.2g} % of the models' difference"
        if self.share < FLOOR:
            raise FamilyError(
                f"{found}, and the rest lies in {names}: degrade the model by a LoRA on its linear layers, whose change a "
                "vector can hold."
            )
        if self.share < HALF:
            return f"{found}; the rest, most of it in {names}, is left out of the vector."
        return None


def adapter_coverage(
    aligned: StoredModel, degraded: StoredModel, truncations: Mapping[str, Truncation]
) -> Coverage:
    """The coverage of two models of one base model, from their adapters; of the files only what an
    adapter replaces is read.
    """
    own_files = {
        name
        for stored in (aligned, degraded)
        for name in (*stored.own_tensors(), *stored.trained_rows)
    }
    replaced = {name: own for name, own in aligned.text_files.items() if own in own_files}
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for sign, stored in ((1, aligned), (-1, degraded)):
        for name, own in task_matrices(stored.model).items():
            if name not in truncations and aligned.weight_files.get(name) not in replaced.values():
                pairs.setdefault(name, []).extend((a, sign * b) for a, b in own)
    left_out = {}
    for name, both in pairs.items():
        a, b = torch.cat([a for a, _ in both]), torch.cat([b for _, b in both], dim=1)
        left_out[name] = factors_at_rank(a, b, a.shape[0]).squares
    with RowReader() as reader:
        left_out |= differences(aligned, degraded, replaced, reader)
    return Coverage(sum(truncation.squares for truncation in truncations.values()), left_out)


def differences(
    aligned: StoredModel,
    degraded: StoredModel,
    names: Mapping[str, str],
    reader: RowReader,
    advance: Callable[[int], object] = int,
) -> dict[str, float]:
    """The squared Frobenius norm of every named tensor's difference, adapters folded in, without
    the tensors that are equal.

    Args:
        aligned: One model.
        degraded: The other.
        names: By their names without a wrapper the names of tensors in the aligned model's files;
            both models have them in one shape.
        reader: For both models' files.
        advance: Is told how many bytes were read.

    Raises:
        FamilyError: A tensor is not in both, or in two shapes.
        CheckpointError: One holds NaN or infinity.
    """
    floating = [
        name for name in sorted(names) if aligned.files[names[name]].dtype.is_floating_point
    ]
    for name in floating:
        other = degraded.files.get(degraded.text_files.get(name, ""))
        if other is None or other.shape != aligned.files[names[name]].shape:
            raise FamilyError(
                f"`{name}` differs in shape between the aligned and the degraded model: use one family."
            )
    blocks = [block for name in floating for block in row_blocks(name, aligned.files[names[name]])]
    found: dict[str, float] = {}
    for block, squares in zip(
        blocks, in_threads(partial(_squares, aligned, degraded, reader), blocks), strict=True
    ):
        found[block.name] = found.get(block.name, 0.0) + squares
        advance(2 * (block.stop - block.first) * aligned.files[names[block.name]].row_bytes)
    return {name: squares for name, squares in found.items() if squares}


@torch.no_grad()
def _squares(aligned: StoredModel, degraded: StoredModel, reader: RowReader, block: Block) -> float:
    rows = []
    for side, stored in (("aligned", aligned), ("degraded", degraded)):
        own = Block(stored.text_files[block.name], block.first, block.stop)
        rows.append(stored.rows(reader, own, side))
        if not is_finite(rows[-1]):
            raise not_finite(stored, own.name)
    return float(torch.linalg.vector_norm(rows[0].sub_(rows[1]), dtype=torch.float64)) ** 2


def not_finite(stored: StoredModel, tensor: str) -> CheckpointError:
    """That a model has diverged."""
    return CheckpointError(
        f"`{tensor}` of {stored.name} holds NaN or infinity: its training has diverged, so train it again with a smaller "
        "learning rate."
    )
