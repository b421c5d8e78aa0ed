"""How the prompts of one safety step are written, and where their targets begin: as the settings
say, else as the training does it, else as the vector was made.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config.settings import SafeGeneConfig
from ..config.validation import is_template_options
from ..errors import ConfigError
from ..models.reasoning import PROBE, Answering, PromptStyle, ReasoningFormat
from ..vectors.safety_vector import SafetyVector


_COLUMN = "chat_template_kwargs"  # TRL's name
LOOKED_AT = 64  # rows of a training set


@dataclass(frozen=True)
class StepPrompts:
    """How a step writes its prompts.

    Attributes:
        target: The style of prompts whose response is known.
        answering: How answers to the others are asked for, and read.
        warnings: What is right but surprising.
    """

    target: PromptStyle
    answering: Answering
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        config: SafeGeneConfig,
        vector: SafetyVector,
        tokenizer: PreTrainedTokenizerBase,
        trained: Mapping[str, Any],
    ) -> "StepPrompts":
        """Those of a config.

        Args:
            config: Its `data.chat_template_kwargs` come first.
            vector: Its own come last.
            tokenizer: The model's.
            trained: Arguments for the chat template that the training uses, as far as it is known.

        Raises:
            ConfigError: Targets in the reasoning are asked for, and the template has none.
        """
        own = dict(vector.extraction.get("chat_template_kwargs", {}))
        options = config.data.chat_template_kwargs or dict(trained) or own
        answering = Answering.of(tokenizer, options, config.measure.max_reasoning_tokens)
        target = target_style(tokenizer, options, config.data.safety_target, "data.safety_target")
        made = vector.extraction.get("safety_target", target.start)
        warnings = []
        if options != own and answering.record:
            warnings.append(
                f"The safety vector was made with `chat_template_kwargs` {own}, and here they are {options}: its refusals are "
                "taught in other prompts than it was made with. Set `data.chat_template_kwargs` to those that you will serve with, "
                "and where the vector's are others make it with these."
            )
        if made != target.start:
            warnings.append(
                f"The safety vector was made for `safety_target` `{made}`, and here it is `{target.start}`."
            )
        return cls(target, answering, tuple(warnings))

    @property
    def record(self) -> dict[str, Any]:
        """For the report; empty where prompts are written plainly."""
        found = {k: v for k, v in self.answering.record.items() if k == "chat_template_kwargs"}
        return found | target_record(self.target)


def trained_options(arguments: Any, *data_sets: Any) -> dict[str, Any]:
    """The arguments for the chat template that a training uses, as TRL names them; empty where that
    is not known.

    Args:
        arguments: The trainer's: those of GRPO, RLOO and distillation may have them.
        *data_sets: What it trains on, the first that is known: rows may have them in a column.
            Those of its beginning must all have the same.
    """
    named = [getattr(arguments, _COLUMN, None)]
    for rows in data_sets:
        if not named[0] and isinstance(rows, Dataset) and _COLUMN in rows.column_names:
            named = rows.with_format(None)[:LOOKED_AT][_COLUMN] or named
    # Arrow fills up what other rows have
    plain = [{k: v for k, v in (each or {}).items() if v is not None} for each in named]
    alike = all(each == plain[0] for each in plain)
    return plain[0] if alike and is_template_options(plain[0]) else {}


def target_style(
    tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], target: Any, name: str
) -> PromptStyle:
    """The style of prompts whose response is known; `target` is the value of the setting `name`.

    Raises:
        ConfigError: Targets in the reasoning are asked for, and the template has none.
    """
    written = ReasoningFormat.of(tokenizer)
    style = PromptStyle(options, "template" if written is None else target)
    if target == "reasoning":
        prompt = style.prompt(tokenizer, PROBE) if written is not None else ""
        if written is None or written.place(prompt) != "reasoning":
            raise ConfigError(
                f"`{name}` is `reasoning`, and the chat template leaves no reasoning open: leave it at `answer`, or set "
                "`chat_template_kwargs` so that the model thinks."
            )
    return style


def target_record(style: PromptStyle) -> dict[str, Any]:
    """What a record says of where targets begin; empty for a model without reasoning."""
    return {} if style.start == "template" else {"safety_target": style.start}
