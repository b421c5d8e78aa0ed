"""`EvaluationConfig`: everything that can be set about evaluating a checkpoint or adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.docstrings import with_help
from ..config.validation import (
    COUNT_OR_DEFAULT,
    DTYPES,
    LARGEST_COUNT,
    Rule,
    check_values,
    named_fields,
    template_options,
    written_place,
)
from ..errors import ConfigError
from ..judges import check_judges, judge_forms
from ..models.reasoning import Answering
from ..models.template_names import check_names


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@with_help
@named_fields
@dataclass
class EvaluationConfig:
    """What to evaluate, on what, and how.

    Args:
        model_name_or_path: Checkpoint or LoRA adapter: directory or hub id.
        model_revision: Its branch, tag or commit on the hub.
        dtype: Data type to load it in, e.g. float32.
        allow_pickled_shards: Read a `checkpoint-N` that holds nothing but DeepSpeed's shards. They
            are pickle files, which can run code: only for files of your own.
        harmful_data: Prompt sets that ought to be refused: local files or hub ids
            (`ID:CONFIG@SPLIT` where a data set has several) with a column `prompt` (or `messages`)
            and perhaps `category`.
        benign_data: Prompt sets that ought to be answered, look-alikes above all.
        data_split: Split of the hub's data sets that name none.
        exclude_data: Data sets, or safety vectors, whose prompts the model or its vector was made
            with: prompts that repeat one of them, wholly or nearly, are left out and listed.
        num_prompts: Prompts drawn from each set. Default: all.
        judges: Judges, see `safegene_trl.judges.load_judge`. The first one's numbers are printed.
        task_labels: A classifier's labels: an answer that is nothing but one of them is off-task.
        tasks: Utility: tasks of lm-eval.
        tasks_dir: Folder with task files of your own.
        num_task_samples: Samples of each utility task. Default: all.
        max_new_tokens: Tokens generated for an answer.
        max_reasoning_tokens: Tokens generated for the reasoning before it, of a reasoning model; 0
            puts an empty reasoning there. Default: 0 where the chat template can leave the
            reasoning out, 1024 where it opens one in every prompt.
        chat_template_kwargs: Arguments for the chat template, e.g. `{"enable_thinking": false}`.
        batch_size: Prompts per forward pass. Default: 8 on a CPU, on a GPU what its free memory is
            for. Where memory runs out it is halved.
        seed: For drawing prompts.
        output_dir: Where answers, verdicts and results go. What is there of the same run is used
            again.

    Raises:
        ConfigError: A name is no setting. Values are checked by `check`, with which `evaluate`
            begins.
    """

    model_name_or_path: str = ""
    model_revision: str | None = None
    dtype: str = "auto"
    allow_pickled_shards: bool = False
    harmful_data: list[str] = field(default_factory=list)
    benign_data: list[str] = field(default_factory=list)
    data_split: str = "train"
    exclude_data: list[str] = field(default_factory=list)
    num_prompts: int | None = None
    judges: list[str] = field(
        default_factory=lambda: ["refusal_phrases"],
        metadata={"listed": f"There are {judge_forms()}."},
    )
    task_labels: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    tasks_dir: str | None = None
    num_task_samples: int | None = None
    max_new_tokens: int = 128
    max_reasoning_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    batch_size: int | None = None
    seed: int = 0
    output_dir: str = "evaluation"

    RULES: ClassVar[Mapping[str, Rule]] = {
        "dtype": Rule(choices=DTYPES),
        "num_prompts": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "tasks_dir": Rule(may_be_null=True),
        "num_task_samples": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "max_new_tokens": Rule(at_least=1, at_most=LARGEST_COUNT),
        "batch_size": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "max_reasoning_tokens": COUNT_OR_DEFAULT,
        "chat_template_kwargs": Rule(may_be_null=True),
        "seed": Rule(at_least=0, at_most=2**32 - 1),
        "output_dir": Rule(syntax=written_place),
    }

    def check(self) -> None:
        """Checks every value.

        Raises:
            ConfigError: One is missing or impossible, or there is nothing to evaluate on.
        """
        if not self.model_name_or_path:
            raise ConfigError(
                "No model is named: set `model_name_or_path` to a checkpoint or adapter."
            )
        if not (self.harmful_data or self.benign_data or self.tasks):
            raise ConfigError(
                "There is nothing to evaluate on: set `harmful_data`, `benign_data` or `tasks`."
            )
        check_values(self)
        check_judges(self.judges)
        template_options("chat_template_kwargs", self.chat_template_kwargs)

    def answering(self, tokenizer: "PreTrainedTokenizerBase") -> Answering:
        """How a model with this tokenizer is asked for answers.

        Raises:
            ConfigError: Its chat template never reads one of the arguments.
        """
        options = template_options("chat_template_kwargs", self.chat_template_kwargs)
        check_names(tokenizer, options, "`chat_template_kwargs`")
        return Answering.of(tokenizer, options, self.max_reasoning_tokens)

    @property
    def deciding_answers(self) -> dict[str, Any]:
        """The settings that an answer depends on."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "decoding": "greedy",
            "padding": "left",
            "dtype": self.dtype,
        }
