"""A vector's low-rank factors where a model's passes want them: on the module's device, in its data
type.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..distributed.memory import free_bytes
from .low_rank import LowRankDelta


SHARE = 0.25  # of the memory that is free: more of it belongs to activations


def allowed_of(free: int) -> int:
    """Bytes that factors may take of those that are free."""
    return int(SHARE * max(free, 0))


def describe_place(needed: int, allowed: int) -> dict[str, Any]:
    """Whether factors stay on their device, what they take and what they are allowed (MiB)."""
    sizes = {"mib": round(needed / 2**20, 3), "allowed_mib": round(allowed / 2**20, 3)}
    return {"place": "resident" if needed <= allowed else "fetched", **sizes}


class Factors:
    """The factors `A` and `B` of all modules, for one pass after another.

    They are 0.5 to 2 % of the weights. Where there is room they are brought to their device once
    and stay there until `clear`; where not, each is fetched anew for every pass.

    Args:
        deltas: The vector's low-rank deltas by module name.

    Attributes:
        copies: How many factor pairs were copied or cast since the last `clear`.
        room: Bytes that they were allowed when it was decided whether they stay; None before the
            first pass.
    """

    def __init__(self, deltas: Mapping[str, LowRankDelta]):
        self._deltas = deltas
        self._held: dict[
            tuple[str, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]
        ] = {}
        self._stay: bool | None = None  # not known before the first pass
        self.copies = 0
        self.room: int | None = None
        self._needed = 0

    def of(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` (r×d_in) and `B` (d_out×r) of a module, with the device and data type of `like`."""
        key = (name, like.device, like.dtype)
        if (held := self._held.get(key)) is not None:
            return held
        if self._stay is None:
            self.room, self._needed = (
                allowed_of(free_bytes(like.device)),
                self.num_bytes(like.dtype),
            )
            self._stay = self._needed <= self.room
        delta = self._deltas[name]
        # the device first: to change both at once torch would cast on the CPU
        pair = delta.a.to(like.device).to(like.dtype), delta.b.to(like.device).to(like.dtype)
        self.copies += 1
        if self._stay:
            self._held[key] = pair
        return pair

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Of all factors in a data type."""
        numbers = sum(delta.a.numel() + delta.b.numel() for delta in self._deltas.values())
        return numbers * dtype.itemsize

    @property
    def resident(self) -> bool:
        """Whether they stay where they are computed with."""
        return bool(self._held)

    def describe(self) -> dict[str, Any]:
        """For the report: whether they stay, how much they take, and how much they were allowed
        (MiB); empty before a pass.
        """
        return {} if self.room is None else describe_place(self._needed, self.room)

    def clear(self) -> None:
        """Gives their memory back; the next pass decides anew."""
        self._held.clear()
        self._stay, self.room, self.copies = None, None, 0
