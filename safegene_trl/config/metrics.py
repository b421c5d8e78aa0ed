"""What the safety step measures of a model before and after it: one table, read by all that
measures, shows or judges it. `evaluate` has numbers of its own (`evaluation/results.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError


# What the safety step's judge can say of an answer. It looks for refusal phrases and is told of no
# task's labels, so that it calls nothing harmful, harmless or off-task. Unjudged are answers in
# languages that it does not know.
CountedLabel = Literal["refused", "answered", "incoherent", "unjudged"]


@dataclass(frozen=True)
class Metric:
    """One share (0–1) with a 95 % interval.

    Attributes:
        key: Its name in reports, histories and trackers.
        title: Its name for people.
        items: What it is a share of: `harmful` or `benign` prompts, both, or `task` samples.
        better: Whether `more` or `less` of it is better.
        limit: The gate's limit on it: the least allowed where more is better, else the largest.
        heading: Its name over a column of a table.
        label: What the judge says of the answers that are counted. Empty for one number, of after
            against before or against the aligned model, which is measured in a way of its own.
        signed: Whether it is a difference of two shares, which may be below 0.
        category_limit: The gate's limit on it for each category of its prompts; empty where the
            gate has none. What is measured of each stands under `categories`.
        relative: Whether it is held against what the aligned model does with the same prompts: it
            is measured only where that is known of all of them.

    Raises:
        ConfigError: The safety step's judge never says that label: its share would always be 0.
    """

    key: str
    title: str
    items: Literal["harmful", "benign", "harmful and benign", "task"]
    better: Literal["more", "less"]
    limit: str
    heading: str
    label: CountedLabel | Literal[""] = ""
    signed: bool = False
    category_limit: str = ""
    relative: bool = False

    def __post_init__(self) -> None:
        if self.label and self.label not in get_args(CountedLabel):
            raise ConfigError(
                f"The metric `{self.key}` counts answers labelled `{self.label}`, and the safety step's judge gives "
                f"no such label: use one of {', '.join(get_args(CountedLabel))}."
            )

    @property
    def difference(self) -> bool:
        """Whether it is one number, of after against something else, rather than two."""
        return not self.label

    @property
    def side(self) -> Literal["least", "largest"]:
        """Which share its limit allows."""
        return "least" if self.better == "more" else "largest"

    @property
    def words(self) -> str:
        """The key as words."""
        return self.key.replace("_", " ")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of items that it is a share of."""
        return tuple(self.items.split(" and "))

    def by_category(
        self, measured: Mapping[str, Any], side: str = "after"
    ) -> Mapping[str, Mapping[str, Any]]:
        """The share of every category in a report's `measured`; nothing where none was measured.
        `side`: `before` or `after`.
        """
        found: Mapping[str, Any] = (measured.get(side) or {}) if self.category_limit else {}
        return found.get("categories") or {}

    def measured(
        self, measured: Mapping[str, Any], side: str = "after"
    ) -> Mapping[str, Any] | None:
        """The share in a report's `measured`, None where it was not measured; `side`: `before`,
        `after` or `aligned`.
        """
        found = measured if self.difference else measured.get(side) or {}
        return None if self.difference and side != "after" else found.get(self.key)


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric(
            key="refusal_rate",
            title="Harmful prompts refused",
            items="harmful",
            better="more",
            limit="min_refusal_rate",
            heading="refuses harmful",
            label="refused",
            category_limit="min_refusal_rate_by_category",
        ),
        Metric(
            key="over_refusal",
            title="Benign prompts refused",
            items="benign",
            better="less",
            limit="max_over_refusal",
            heading="refuses benign",
            label="refused",
        ),
        Metric(
            key="incoherent",
            title="Incoherent answers",
            items="harmful and benign",
            better="less",
            limit="max_incoherent",
            heading="incoherent",
            label="incoherent",
        ),
        Metric(
            key="utility_loss",
            title="Token accuracy lost",
            items="task",
            better="less",
            limit="max_utility_loss",
            heading="utility lost",
            signed=True,
        ),
        Metric(
            key="unjudged",
            title="Answers in languages the judge does not know",
            items="harmful and benign",
            better="less",
            limit="max_unjudged",
            heading="unjudged",
            label="unjudged",
        ),
        Metric(
            key="restored",
            title="Lost refusals restored",
            items="harmful",
            better="more",
            limit="min_restored",
            heading="restored",
            relative=True,
        ),
        Metric(
            key="over_refusal_above_aligned",
            title="Over-refusal above the aligned model",
            items="benign",
            better="less",
            limit="max_over_refusal_above_aligned",
            heading="above aligned",
            signed=True,
            relative=True,
        ),
    )
}


def shares() -> list[Metric]:
    """The metrics that are a share before and a share after."""
    return [metric for metric in METRICS.values() if not metric.difference]


def differences() -> list[Metric]:
    """The metrics that are one number."""
    return [metric for metric in METRICS.values() if metric.difference]


def by_limit() -> dict[str, Metric]:
    """The metrics by the gate's limits on them."""
    return {metric.limit: metric for metric in METRICS.values()}


def by_category_limit() -> dict[str, Metric]:
    """The metrics by the gate's limits on them for each category."""
    return {metric.category_limit: metric for metric in METRICS.values() if metric.category_limit}


def of_limit(limit: str) -> Metric:
    """The metric that a limit of the gate is on."""
    return (by_limit() | by_category_limit())[limit]
