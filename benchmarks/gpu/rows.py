"""Which rows there are, and what their figures are to be; needs neither torch nor a GPU."""

from dataclasses import dataclass
from typing import Any


# ranks of the components, and the share of the layers that the vector changes
VECTORS: dict[str, tuple[tuple[int, ...], float]] = {
    "half": ((8,), 0.5),
    "components": ((8, 8, 8), 1.0),
}


@dataclass(frozen=True)
class Row:
    """One process's work.

    Attributes:
        size: Of the model: `1b`, `8b`, `tiny`, or the folder's name of a model of somebody's own.
        vector: One of `VECTORS`, or `own`, one of somebody's own for their model.
        work: `step`, a fine-tune with the whole safety step after it, or `attached`, passes and
            decoding with the vector on.
    """

    size: str
    vector: str
    work: str

    @property
    def name(self) -> str:
        return f"{self.size}/{self.vector}/{self.work}"

    @classmethod
    def named(cls, name: str) -> "Row":
        return cls(*name.rsplit("/", 2))


@dataclass(frozen=True)
class Aim:
    """A limit that a figure is to keep.

    Attributes:
        what: In words.
        most: The limit.
        path: Where a row has the figure.
        only: Sizes or vectors for which it holds; none for all.
    """

    what: str
    most: float
    path: tuple[str, ...]
    only: tuple[str, ...] = ()

    def figure(self, row: Row, figures: dict[str, Any]) -> float | None:
        """None where the row does not have it, or the aim is of others."""
        if self.only and not {row.size, row.vector} & {*self.only}:
            return None
        found: Any = figures
        for key in self.path:
            found = found.get(key) if isinstance(found, dict) else None
        return found


AIMS = (
    Aim("seconds of the whole step", 12, ("step_seconds_at_most",), ("1b",)),
    Aim("seconds of the whole step", 30, ("step_seconds_at_most",), ("8b",)),
    Aim("share of a fine-tune of 1,000 steps of 16", 0.03, ("share_of_1000_steps",)),
    Aim("the step's peak memory, over the training's", 1.02, ("peak_over_training",)),
    # a random vector hardly moves the objective
    Aim("passes to 1 % of the final objective", 5, ("search", "passes_to_1_percent"), ("own",)),
    Aim("copies to the device in a pass", 0, ("copies_per_pass", "with_vector")),
    Aim("copies of factors in a pass", 0, ("copies_per_pass", "of_factors")),
    Aim("copies to the device for a token", 0, ("copies_per_token", "with_vector")),
    Aim("copies of factors for a token", 0, ("copies_per_token", "of_factors")),
    Aim("seconds a token, weights with the vector in, over without", 1.05, ("decoding", "merged")),
    Aim("seconds a token, vector beside the weights, over without", 1.05, ("decoding", "beside")),
)


def wanted(sizes: list[str], own: str | None = None) -> list[Row]:
    """All rows: what matters most first, should the minutes not be enough for all.

    Args:
        sizes: Of models that get random vectors.
        own: Name of the model that has a vector of its own.
    """
    ways = (("half", "step"), ("components", "attached"), ("components", "step"))
    rows = [Row(size, vector, work) for vector, work in ways for size in sizes]
    return [Row(own, "own", work) for work in ("step", "attached") if own] + rows
