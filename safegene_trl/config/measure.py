"""What users set of the measurement before and after."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .validation import (
    COUNT,
    COUNT_OR_DEFAULT,
    COUNT_OR_NONE,
    Rule,
    check_values,
    named_fields,
)


@named_fields
@dataclass
class MeasureConfig:
    """What the model does before and after the step.

    Args:
        num_test_prompts: How many harmful prompts, benign prompts and task samples, of each and at
            most, the model is measured on: none of those that the coefficients were fitted on. 0
            leaves measuring out.
        max_new_tokens: Tokens generated for each answer.
        max_reasoning_tokens: Tokens generated for the reasoning before it, of a reasoning model; 0
            puts an empty reasoning there. Default: 0 where the chat template can leave the
            reasoning out, 1024 where it opens one in every prompt.
        num_examples: How many prompts the report shows with the answers before and after, cut to
            200 characters: only prompts that come with the vector, and of answers to harmful ones
            no more than the words by which the judge knows a refusal. 0 leaves them out.

    Raises:
        ConfigError: A name is no setting (the nearest one is named), or a value is impossible.
    """

    num_test_prompts: int = 64
    max_new_tokens: int = 32
    max_reasoning_tokens: int | None = None
    num_examples: int = 5

    RULES: ClassVar[Mapping[str, Rule]] = {
        "num_test_prompts": COUNT_OR_NONE,
        "max_new_tokens": COUNT,
        "max_reasoning_tokens": COUNT_OR_DEFAULT,
        "num_examples": COUNT_OR_NONE,
    }

    def __post_init__(self) -> None:
        check_values(self, prefix="measure.")
