"""What rounding to a data type leaves of a change of weights: a small vector on large 16-bit
weights can vanish in it.
"""

import math
from typing import Any

import torch

from ..errors import OutputError


class Rounding:
    """Adds up, over the tensors of a merge, how the rounded change compares with the intended one.

    With `Δ` the intended change of all weights and `Δ'` the change after rounding, the share that
    is kept is `⟨Δ', Δ⟩ / ‖Δ‖²`: 1 where nothing is lost.
    """

    def __init__(self) -> None:
        self.weights = self.changed = 0
        self._product = self._square = 0.0

    def add(
        self,
        name: str,
        before: torch.Tensor,
        after: torch.Tensor,
        rounded: torch.Tensor,
        before_is_rounded: bool = False,
    ) -> None:
        """Takes in one tensor, or a part of one.

        Args:
            name: Its name.
            before: Float32 weights without the change.
            after: The same with it.
            rounded: `after` in the data type that is written.
            before_is_rounded: `before` comes from weights of that data type, so that a cast to it
                would change nothing.

        Raises:
            OutputError: A changed weight is not finite in that data type.
        """
        held = before if before_is_rounded else before.to(rounded.dtype).float()
        written = rounded.float() if rounded.itemsize == 1 else rounded
        # into float32: a difference of two 16-bit numbers need not be one
        kept = torch.sub(written, held, out=torch.empty_like(before)).flatten()
        wanted = (after - before).flatten()
        product, square = float(torch.dot(kept, wanted)), float(torch.dot(wanted, wanted))
        if not (math.isfinite(product) and math.isfinite(square)):
            if not is_finite(rounded):
                raise OutputError(
                    f"`{name}` would hold NaN or infinity with the safety vector in it: use smaller coefficients, or check "
                    "the fine-tune."
                )
            # The weights are fine and only the squares are more than float32 holds.
            product, square = (
                float(torch.dot(kept.double(), wanted.double())),
                float(wanted.double().square().sum()),
            )
        self.weights += kept.numel()
        self.changed += int(kept.count_nonzero())
        self._product += product
        self._square += square

    def include(self, other: "Rounding") -> None:
        """Takes in what another one, of another thread as a rule, has added up."""
        self.weights += other.weights
        self.changed += other.changed
        self._product += other._product
        self._square += other._square

    def check(self) -> dict[str, Any]:
        """For the report: `weights` in the changed tensors, `changed_weights`, and `kept`, the
        share of the change.

        Raises:
            OutputError: Rounding has taken all of it away.
        """
        if self._square > 0 and not self.changed:
            raise OutputError(
                f"Rounding takes the safety vector away: 0 of {self.weights} weights would change. Save the fine-tune in "
                "float32, or set `output.output_format: adapter`."
            )
        kept = self._product / self._square if self._square > 0 else 1.0
        return {"weights": self.weights, "changed_weights": self.changed, "kept": kept}


@torch.no_grad()
def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of floating-point numbers holds neither NaN nor infinity; others always are."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor
    # One pass without a second tensor of that size: NaN and infinity pass through a sum.
    if math.isfinite(float(wide.sum(dtype=torch.promote_types(wide.dtype, torch.float32)))):
        return True
    return bool(torch.isfinite(wide).all())
