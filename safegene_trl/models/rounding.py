"""What rounding to a data type leaves of a change of weights: a small vector on large 16-bit weights can vanish in it."""

from typing import Any

import torch

from ..errors import OutputError


class Rounding:
    """Adds up, over the tensors of a merge, how the rounded change compares with the intended one.

    With `Δ` the intended change of all weights and `Δ'` the change after rounding, the share that is kept is
    `⟨Δ', Δ⟩ / ‖Δ‖²`: 1 where nothing is lost.
    """

    def __init__(self) -> None:
        self.weights = self.changed = 0
        self._product = self._square = 0.0

    def add(self, name: str, before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> None:
        """Takes in one tensor.

        Args:
            name: Its name.
            before: Float32 weights without the change.
            after: The same with it.
            dtype: Data type that they are rounded to.

        Raises:
            OutputError: A changed weight is not finite in that data type.
        """
        rounded = after.to(dtype).float()
        if not bool(torch.isfinite(rounded).all()):
            raise OutputError(
                f"`{name}` would hold NaN or infinity with the safety vector in it: use smaller coefficients, or check the "
                "fine-tune."
            )
        kept, wanted = rounded - before.to(dtype).float(), after - before
        self.weights += kept.numel()
        self.changed += int(kept.count_nonzero())
        self._product += float((kept * wanted).sum(dtype=torch.float64))
        self._square += float((wanted**2).sum(dtype=torch.float64))

    def check(self) -> dict[str, Any]:
        """For the report: `weights` in the changed tensors, `changed_weights`, and `kept`, the share of the change.

        Raises:
            OutputError: Rounding has taken all of it away.
        """
        if self._square > 0 and not self.changed:
            raise OutputError(
                f"Rounding takes the safety vector away: 0 of {self.weights} weights would change. Save the fine-tune in "
                "float32, or set `output_format: adapter`."
            )
        kept = self._product / self._square if self._square > 0 else 1.0
        return {"weights": self.weights, "changed_weights": self.changed, "kept": kept}
