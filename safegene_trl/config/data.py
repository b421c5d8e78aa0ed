"""What users set of the samples that coefficients are fitted on and held against."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import ConfigError
from .validation import (
    COUNT,
    COUNT_OR_NONE,
    LARGEST_COUNT,
    Rule,
    check_values,
    named_fields,
    template_options,
)


_FITTED_AND_HELD_OUT = Rule(
    at_least=2, at_most=LARGEST_COUNT, too_low="at least 2 are needed, one of them held out"
)


@named_fields
@dataclass
class DataConfig:
    """Samples that the coefficients are fitted on, and those held out for the decision whether the
    result is taken.

    Args:
        safety_data: Dataset of harmful prompts, with or without refusals (local
            JSON/JSONL/CSV/Parquet file, `datasets` directory or hub id, `ID:CONFIG@SPLIT` where it
            has several). Default: the prompts and refusals that come with the vector.
        safety_data_split: Split of `safety_data` to read.
        task_data: Dataset the utility term is measured on, in any TRL format. Default: the training
            set.
        task_data_split: Split of `task_data` to read.
        num_safety_shots: Harmful prompts used in all, held-out ones included.
        num_task_shots: Task samples used in all, held-out ones included.
        num_benign_shots: Benign prompts of the vector used in all to keep the model from
            over-refusing.
        num_border_shots: Benign prompts of the vector that the aligned model itself refuses, used in
            all and at most: they keep what the fine-tuned model refuses as near to the aligned
            model as can be. Only those of which the vector has soft targets.
        holdout_share: Share (0–1) of the shots kept out of the optimisation, for the acceptance
            decision.
        max_length: Task and benign samples are cut to this many tokens. Harmful prompts are never
            cut.
        max_refusal_tokens: The safety terms read this many first tokens of a refusal or benign
            answer: whether a model refuses is settled there (arXiv 2406.05946).
        max_response_tokens: The utility term reads at most this many response tokens of a sample.
        chat_template_kwargs: Arguments for the chat template, e.g. `{enable_thinking: false}`, with
            which all prompts are written; `{}` are none. Default: those of the training, where TRL
            names some; else those that the vector was made with.
        safety_target: Where a reasoning model's refusals and benign answers begin: at the `answer`,
            after an empty reasoning, or in the `reasoning`.

    Raises:
        ConfigError: A name is no setting (the nearest one is named), or a value is impossible.
    """

    safety_data: str | None = None
    safety_data_split: str = "train"
    task_data: str | None = None
    task_data_split: str = "train"
    num_safety_shots: int = 32
    num_task_shots: int = 32
    num_benign_shots: int = 32
    num_border_shots: int = 16
    holdout_share: float = 0.25
    max_length: int = 512
    max_refusal_tokens: int = 8
    max_response_tokens: int = 64
    chat_template_kwargs: dict[str, Any] | None = None
    safety_target: Literal["answer", "reasoning"] = "answer"

    RULES: ClassVar[Mapping[str, Rule]] = {
        "num_safety_shots": _FITTED_AND_HELD_OUT,
        "num_task_shots": _FITTED_AND_HELD_OUT,
        "num_benign_shots": COUNT_OR_NONE,
        "num_border_shots": COUNT_OR_NONE,
        "holdout_share": Rule(at_least=0.0),
        "max_length": COUNT,
        "max_refusal_tokens": COUNT,
        "max_response_tokens": COUNT,
        "chat_template_kwargs": Rule(may_be_null=True),
    }

    def __post_init__(self) -> None:
        check_values(self, prefix="data.")
        template_options("data.chat_template_kwargs", self.chat_template_kwargs)
        if not 0.0 < self.holdout_share < 1.0:
            raise ConfigError(
                f"`data.holdout_share` is {self.holdout_share}: it must lie strictly between 0 and 1."
            )
