"""The few samples that recalibration reads: to fit the coefficients on, and held out to judge them."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import CalibrationDataError
from ..models.inputs import Sample


@dataclass(frozen=True)
class Split:
    """Samples to fit the coefficients on and samples to judge them on."""

    fit: list[Sample]
    held_out: list[Sample]

    @property
    def samples(self) -> list[Sample]:
        """All of them."""
        return [*self.fit, *self.held_out]


@dataclass(frozen=True)
class CalibrationSet:
    """What recalibration reads. `benign` and `border` may be None; the other two never are.

    Attributes:
        harmful: Prompts with the aligned model's refusals.
        task: The fine-tune's own samples.
        benign: Prompts with the aligned model's answers.
        border: Benign prompts that it refuses, all with soft targets: they are held to what it finds
            likely there and never to the words of its refusal, which would push past it.
    """

    harmful: Split
    task: Split
    benign: Split | None = None
    border: Split | None = None

    @property
    def all_benign(self) -> Split | None:
        """The prompts of the benign term, on the border or not."""
        return joined(self.benign, self.border)

    @property
    def samples(self) -> list[Sample]:
        """All of them."""
        splits = [split for split in (self.task, self.harmful, self.all_benign) if split]
        return [sample for split in splits for sample in split.samples]


def joined(*splits: Split | None) -> Split | None:
    """Several splits as one, each on its own side; None of none."""
    found = [split for split in splits if split is not None]
    if not found:
        return None
    return Split(
        [sample for split in found for sample in split.fit],
        [sample for split in found for sample in split.held_out],
    )


def check_context(samples: Iterable[Sample], context: int | None, what: str) -> None:
    """Raises `CalibrationDataError` if a sample is longer than the model's context, in tokens."""
    longest = max((len(sample.input_ids) for sample in samples), default=0)
    if context is not None and longest > context:
        raise CalibrationDataError(
            f"A sample of the {what} has {longest} tokens and the model's context is {context}: shorten or remove it."
        )


def split_samples(
    samples: list[Sample], holdout_share: float, what: str, skipped: object = ""
) -> Split:
    """Splits samples in the order given; at least one on each side. `skipped` tells in the error
    what was left out.
    """
    if len(samples) < 2:
        raise CalibrationDataError(
            f"The {what} has {len(samples)} usable samples{skipped}: give at least 2."
        )
    held_out = min(max(round(len(samples) * holdout_share), 1), len(samples) - 1)
    return Split(samples[:-held_out], samples[-held_out:])
