"""The options of `safegene apply`, for those that read them: the command, its estimate, and a fleet
for each of its members.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..config.docstrings import with_help
from ..config.validation import DTYPES, Rule, check_values
from .parsing import SafeGeneArguments


@with_help
@dataclass
class ApplyArguments:
    """What to safeguard.

    Args:
        model_name_or_path: Finished checkpoint or LoRA adapter, as a directory or hub id.
        model_revision: Its branch, tag or commit on the hub.
        dtype: Data type to load it in, and to save it in unless `output.dtype` names another, e.g.
            float32.
        coefficients: Coefficients to take as they are, instead of recalibrating: a number for every
            layer, the report of an earlier safety step with the same vector, or `interference`
            (EnchTable's rule). The weights are then merged from file to file.
        allow_pickled_shards: Read a `checkpoint-N` that holds nothing but DeepSpeed's shards. They
            are pickle files, which can run code: only for files of your own.
        base_model: The aligned model; only for `interference` on a full fine-tune.
        fleet: A YAML file of many fine-tunes, done in parallel (see docs/pipelines.md); no other
            option goes with it.
    """

    model_name_or_path: str = ""
    model_revision: str | None = None
    dtype: str = "auto"
    coefficients: str | None = None
    allow_pickled_shards: bool = False
    base_model: str | None = None
    fleet: str | None = None

    RULES: ClassVar[Mapping[str, Rule]] = {
        "dtype": Rule(choices=DTYPES),
        "coefficients": Rule(or_number=True),
    }

    def __post_init__(self):
        check_values(self)


ARGUMENTS = (ApplyArguments, SafeGeneArguments)
