"""What users set of the gate: limits that a safeguarded model must keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .metrics import by_category_limit, by_limit
from .validation import (
    LARGEST_COUNT,
    Rule,
    check_value,
    check_values,
    named_fields,
    shown,
)


SHARE = Rule(at_least=0.0, at_most=1.0, share=True)
CategoryLimit = float | dict[str, float]


@named_fields
@dataclass
class GateConfig:
    """Limits on what the safeguarded model does; None leaves one out. All but `max_blind_spots` are
    shares (0–1).

    Args:
        min_refusal_rate: Least share of harmful prompts that it refuses.
        min_refusal_rate_by_category: The same for the prompts of each category that is measured on:
            one share for all, or a block of shares by category.
        max_over_refusal: Largest share of benign prompts that it refuses.
        max_incoherent: Largest share of incoherent answers among all.
        max_unjudged: Largest share of answers, among all, in languages that the judge does not
            know. With or without it, such answers count against every other limit on answers.
        max_utility_loss: Largest loss of token accuracy on task samples, against the fine-tune as
            it was (0.01 is one point).
        min_restored: Of the harmful prompts that the aligned model refuses and the fine-tune did
            not, or no longer does afterwards, the least share that is refused afterwards. Kept where
            there are none.
        max_over_refusal_above_aligned: The most by which the share of benign prompts that it refuses
            may lie above that of the aligned model (0.05 is five points).
        harmful_data: Harmful prompts to measure on (local file or hub id). Default: the vector's
            prompts for that, else those of the calibration's that nothing was fitted on. What the
            aligned model does is not known of prompts that are named here.
        harmful_data_split: Split of `harmful_data` to read.
        benign_data: The same of benign prompts.
        benign_data_split: Split of `benign_data` to read.
        max_blind_spots: Most blind spots that an audit of the vector (`safegene audit`) may have
            found. Without such an audit nothing is trained.
        audit: The audit's `audit.json`, or the folder it lies in. Default: the one in the vector's
            folder.
        write_rejected: Write the checkpoint even if it is rejected. Its report says so.

    Raises:
        ConfigError: A name is no setting (the nearest one is named), a limit is no share, a value is
            impossible, or a limit against the aligned model is set beside prompts that nothing is
            known of.
    """

    min_refusal_rate: float | None = None
    min_refusal_rate_by_category: float | dict[str, float] | None = None
    max_over_refusal: float | None = None
    max_incoherent: float | None = None
    max_unjudged: float | None = None
    max_utility_loss: float | None = None
    min_restored: float | None = None
    max_over_refusal_above_aligned: float | None = None
    harmful_data: str | None = None
    harmful_data_split: str = "train"
    benign_data: str | None = None
    benign_data_split: str = "train"
    max_blind_spots: int | None = None
    audit: str | None = None
    write_rejected: bool = False

    RULES: ClassVar[Mapping[str, Rule]] = {
        **dict.fromkeys([*by_limit(), *by_category_limit()], SHARE),
        "max_blind_spots": Rule(at_least=0, at_most=LARGEST_COUNT),
    }

    def __post_init__(self) -> None:
        check_values(self, prefix="gate.")
        for name, value in self.category_limits.items():
            _check_categories(f"gate.{name}", value)
        if self.audit is not None and self.max_blind_spots is None:
            raise ConfigError(
                "`gate.audit` is set and `gate.max_blind_spots` is not: set both, or leave out `gate.audit`."
            )
        for name, metric in by_limit().items():
            source = f"{metric.items}_data"
            if metric.relative and name in self.limits and getattr(self, source) is not None:
                raise ConfigError(
                    f"`gate.{name}` and `gate.{source}` are both set, and what the aligned model does with prompts that are named "
                    "there is not known: leave one of them out."
                )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, but those for each category."""
        return {name: value for name in by_limit() if (value := getattr(self, name)) is not None}

    @property
    def category_limits(self) -> dict[str, CategoryLimit]:
        """The limits for each category that are set: one for all, or by category."""
        found = {name: getattr(self, name) for name in by_category_limit()}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def names(self) -> list[str]:
        """The names of all limits that are set."""
        return [*self.limits, *self.category_limits]


def _check_categories(name: str, value: CategoryLimit) -> None:
    """Raises `ConfigError` for a block of limits by category that has none, or one that is no share."""
    if not isinstance(value, dict):
        return
    if not value:
        raise ConfigError(f"`{name}` is empty: give each category its share, or leave it out.")
    for category, share in value.items():
        if not isinstance(category, str):
            raise ConfigError(
                f"`{name}` has {shown(category)} for a category: write its name in quotes."
            )
        check_value(f"{name}.{category}", share, float, SHARE)
