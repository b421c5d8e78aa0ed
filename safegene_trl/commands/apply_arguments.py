"""The options of `safegene apply`, for those that read them: the command, its estimate, and a fleet
for each of its members.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ..config.validation import DTYPES, Rule, check_values
from .parsing import SafeGeneArguments


@dataclass
class ApplyArguments:
    """What to safeguard.

    Args:
        model_name_or_path: Finished checkpoint or LoRA adapter, as a directory or hub id.
        model_revision: Its branch, tag or commit on the hub.
        dtype: Data type to load and save it in.
        coefficients: Coefficients to take as they are, instead of recalibrating: a number for every
            layer, the report of an earlier safety step with the same vector, or `interference`
            (EnchTable's rule). The weights are then merged from file to file.
        allow_pickled_shards: Read a `checkpoint-N` that holds nothing but DeepSpeed's shards. They
            are pickle files, which can run code: only for files of your own.
        base_model: The aligned model; only for `interference` on a full fine-tune.
        fleet: A YAML file of many fine-tunes, done in parallel (see `commands/fleet.py`); no other
            option goes with it.
    """

    model_name_or_path: str = field(
        default="", metadata={"help": "Finished checkpoint or adapter: directory or hub id."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit on the hub."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Data type to load and save it in, e.g. float32."}
    )
    coefficients: str | None = field(
        default=None,
        metadata={"help": "Do not recalibrate: a number, an earlier report, or `interference`."},
    )
    allow_pickled_shards: bool = field(
        default=False,
        metadata={
            "help": "Read DeepSpeed's shards, pickle files that can run code: only your own."
        },
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Aligned model, for `interference` on a full fine-tune."}
    )
    fleet: str | None = field(
        default=None, metadata={"help": "YAML file of many fine-tunes; goes alone."}
    )

    RULES: ClassVar[Mapping[str, Rule]] = {
        "dtype": Rule(choices=DTYPES),
        "coefficients": Rule(or_number=True),
    }

    def __post_init__(self):
        check_values(self)


ARGUMENTS = (ApplyArguments, SafeGeneArguments)
