"""The errors this package raises. Every one is a `SafeGeneError` whose message says in one sentence
what to do.
"""

from typing import Any


class SafeGeneError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(SafeGeneError):
    """A configuration value or recipe key is unknown, out of range or contradicts another one."""


class VectorError(SafeGeneError):
    """A safety vector is missing, incomplete, altered, or of a format this version does not read."""


class FamilyError(SafeGeneError):
    """Model, tokenizer and safety vector do not belong to one model family."""


class UnsupportedModelError(SafeGeneError):
    """The fine-tune is of a kind that cannot be safeguarded yet (named in the message)."""


class CheckpointError(SafeGeneError):
    """The weight files of a checkpoint are missing or damaged."""


class CalibrationDataError(SafeGeneError):
    """Calibration data is empty, lacks usable columns, or holds samples that the model cannot read."""


class OutputError(SafeGeneError):
    """The checkpoint cannot be written where it was asked for."""


class RecalibrationError(SafeGeneError):
    """No coefficients improve held-out safety within the utility budget."""


class RejectedError(RecalibrationError):
    """The safeguarded model does not keep the gate's limits, or no coefficients are acceptable.

    Attributes:
        report: The safety step's report, as it lies in the failure report; None where the step had
            not begun.
    """

    report: dict[str, Any] | None = None


class PlotError(SafeGeneError):
    """A picture cannot be drawn or written; what it shows is not touched by that."""


class SignatureError(SafeGeneError):
    """A signature is missing, invalid, or cannot be made."""


class PeerError(SafeGeneError):
    """Another rank of the same job failed; the message names it and its cause."""


class MemoryShortageError(SafeGeneError):
    """Memory ran out even with the smallest batches."""


class UnexpectedError(SafeGeneError):
    """The safety step failed by an error that nothing here foresaw; its cause is chained to it.

    Args:
        message: One sentence that says what failed and what to do.
        on_all_ranks: As the attribute.

    Attributes:
        on_all_ranks: Whether every rank of the job raises it, so that all of them can go on.
    """

    def __init__(self, message: str, on_all_ranks: bool = True):
        super().__init__(message)
        self.on_all_ranks: bool = on_all_ranks
