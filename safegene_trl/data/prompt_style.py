"""How the prompts of one safety step are written, and where their targets begin: as the settings
say, else as the training does it, else as the vector was made.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config.settings import SafeGeneConfig
from ..errors import ConfigError
from ..models.reasoning import PROBE, Answering, PromptStyle, ReasoningFormat
from ..models.template_names import check_names, unread_names
from ..vectors.safety_vector import SafetyVector
from .rows import UnreadableRowError, sorted_arguments


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
            ConfigError: Targets in the reasoning are asked for, and the template has none; or it
                never reads an argument that the settings name.
        """
        own = dict(vector.extraction.get("chat_template_kwargs", {}))
        options, warnings = _options(config, dict(trained), own, tokenizer)
        answering = Answering.of(tokenizer, options, config.measure.max_reasoning_tokens)
        target = target_style(tokenizer, options, config.data.safety_target, "data.safety_target")
        made = vector.extraction.get("safety_target", target.start)
        if options != own and answering.record:
            warnings.append(
                f"The safety vector was made with `chat_template_kwargs` {own}, and here they are {options}: its refusals are "
                "taught in other prompts than it was made with. Set `data.chat_template_kwargs` to those that you will serve with, "
                "and where the vector's are others make it with these."
            )
        if made != target.start:
            here = (
                "the chat template here has no reasoning"
                if target.start == "template"
                else f"here it is `{target.start}`"
            )
            warnings.append(f"The safety vector was made for `safety_target` `{made}`, and {here}.")
        asked = config.measure.max_reasoning_tokens
        if ignored := answering.ignores(asked, "measure.max_reasoning_tokens"):
            warnings.append(ignored)
        return cls(target, answering, tuple(warnings))

    @property
    def record(self) -> dict[str, Any]:
        """For the report; empty where prompts are written plainly."""
        found = {k: v for k, v in self.answering.record.items() if k == "chat_template_kwargs"}
        return found | target_record(self.target)


def _options(
    config: SafeGeneConfig,
    trained: dict[str, Any],
    own: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, Any], list[str]]:
    """The arguments for the chat template, and a warning where it never reads one of the training's
    or of the vector's.
    """
    if (given := config.data.chat_template_kwargs) is not None:
        # They were set to measure otherwise than by default: nobody would see that it was not done.
        check_names(tokenizer, given, "`data.chat_template_kwargs`")
        return given, []
    warnings = []
    if unread := unread_names(tokenizer, trained):
        # The training wrote its own prompts as if it were not there, and so are these written.
        warnings.append(
            f"The training's `chat_template_kwargs` have {unread}: it changes no prompt, of the training or here; correct the "
            "name if another was meant."
        )
    read = {name: v for name, v in trained.items() if not unread_names(tokenizer, [name])}
    held, others = sorted_arguments(read)
    if others:
        names = ", ".join(f"`{name}`" for name in others)
        warnings.append(
            f"The training's `chat_template_kwargs` have {names}, which is no text, number or truth value: the prompts that "
            "refusals are taught and measured in are written without."
        )
    if held:
        return held, warnings
    # nothing that the user of a vector can correct
    unread = unread_names(tokenizer, own)
    return own, warnings + ([f"The safety vector was made with {unread}."] if unread else [])


def trained_options(arguments: Any, *data_sets: Any) -> dict[str, Any]:
    """The arguments for the chat template that a training uses, as TRL names them; empty where that
    is not known. Those that no setting can hold, as documents, come along as the first row has
    them: prompts are written without, which is said (`StepPrompts.of`).

    Args:
        arguments: The trainer's: those of GRPO, RLOO and distillation may have them.
        *data_sets: What it trains on, the first that is known: rows may have them in a column.
            Those of its beginning must all have the same.
    """
    named = [getattr(arguments, _COLUMN, None)]
    for rows in data_sets:
        if not named[0] and isinstance(rows, Dataset) and _COLUMN in rows.column_names:
            named = rows.with_format(None)[:LOOKED_AT][_COLUMN] or named
    try:
        read = [sorted_arguments(each) for each in named]
    except UnreadableRowError:  # the rows that hold such are counted when they are read
        return {}
    held, others = read[0]
    return (held if all(own == held for own, _ in read) else {}) | others


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
