"""What is measured of a model before and after the safety step: one table, which all that shows or
judges a metric reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One share (0–1) with a 95 % interval.

    Attributes:
        key: Its name in reports, histories and trackers.
        title: Its name for people.
        items: What it is a share of: `harmful` or `benign` prompts, both, or `task` samples.
        better: Whether `more` or `less` of it is better.
        limit: The gate's limit on it: the least allowed where more is better, else the largest.
        difference: Whether it is one number, of after against before, rather than two.
        heading: Its name over a column of a table.
    """

    key: str
    title: str
    items: Literal["harmful", "benign", "harmful and benign", "task"]
    better: Literal["more", "less"]
    limit: str
    difference: bool = False
    heading: str = ""

    @property
    def words(self) -> str:
        """The key as words."""
        return self.key.replace("_", " ")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of items that it is a share of."""
        return tuple(self.items.split(" and "))

    def measured(
        self, measured: Mapping[str, Any], side: str = "after"
    ) -> Mapping[str, Any] | None:
        """The share in a report's `measured`, None where it was not measured; `side`: `before` or
        `after`.
        """
        found = measured if self.difference else measured.get(side) or {}
        return None if self.difference and side == "before" else found.get(self.key)


METRICS = (
    Metric(
        "refusal_rate",
        "Harmful prompts refused",
        "harmful",
        "more",
        "min_refusal_rate",
        heading="refuses harmful",
    ),
    Metric(
        "over_refusal",
        "Benign prompts refused",
        "benign",
        "less",
        "max_over_refusal",
        heading="refuses benign",
    ),
    Metric(
        "incoherent",
        "Incoherent answers",
        "harmful and benign",
        "less",
        "max_incoherent",
        heading="incoherent",
    ),
    Metric(
        "utility_loss",
        "Token accuracy lost",
        "task",
        "less",
        "max_utility_loss",
        True,
        "utility lost",
    ),
)
SHARES = tuple(metric for metric in METRICS if not metric.difference)
