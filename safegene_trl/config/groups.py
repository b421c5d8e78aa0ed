"""The groups of `SafeGeneConfig` but its gate: what is read, how coefficients are searched, what is
measured, what is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import ConfigError
from .validation import (
    LARGEST_COUNT,
    Rule,
    Settings,
    check_values,
    file_size,
    folder,
    named_fields,
    repository,
    written_place,
)


Granularity = Literal["layer", "module", "rank"]  # from coarse to fine
OutputFormat = Literal["merged", "adapter", "both"]
LARGEST_COEFFICIENT = 100.0  # of any coefficient, wherever it comes from; ten times the vector is far beyond use already
_COUNT, _COUNT_OR_NONE = (Rule(at_least=least, at_most=LARGEST_COUNT) for least in (1, 0))
_WEIGHT = Rule(at_least=0.0)


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
        holdout_share: Share (0–1) of the shots kept out of the optimisation, for the acceptance
            decision.
        max_length: Task and benign samples are cut to this many tokens. Harmful prompts are never
            cut.
        max_refusal_tokens: The safety terms read this many first tokens of a refusal or benign
            answer: whether a model refuses is settled there (arXiv 2406.05946).
        max_response_tokens: The utility term reads at most this many response tokens of a sample.

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
    holdout_share: float = 0.25
    max_length: int = 512
    max_refusal_tokens: int = 8
    max_response_tokens: int = 64

    RULES: ClassVar[Mapping[str, Rule]] = {
        "num_safety_shots": _COUNT,
        "num_task_shots": _COUNT,
        "num_benign_shots": _COUNT_OR_NONE,
        "holdout_share": Rule(at_least=0.0),
        "max_length": _COUNT,
        "max_refusal_tokens": _COUNT,
        "max_response_tokens": _COUNT,
    }

    def __post_init__(self) -> None:
        check_values(self, prefix="data.")
        if not 0.0 < self.holdout_share < 1.0:
            raise ConfigError(
                f"`data.holdout_share` is {self.holdout_share}: it must lie strictly between 0 and 1."
            )
        for name in ("num_safety_shots", "num_task_shots"):
            if getattr(self, name) < 2:
                raise ConfigError(
                    f"`data.{name}` is 1: at least 2 are needed, one of them held out."
                )


@named_fields
@dataclass
class SearchConfig:
    """The search for the coefficients: where it may go, what it weighs, what it may cost.

    Args:
        granularity: One coefficient per `layer` (SafeGene's own), per `module`, or per `rank`: for
            each of the r rank-one parts of a module's delta.
        min_coefficient: Lower bound of every coefficient; never below 0, because −V removes
            refusals.
        max_coefficient: Upper bound of every coefficient.
        initial_coefficient: Where the search starts. Default: 0.3, or the nearest bound.
        warm_start: An earlier release's report, or its folder: the search starts at its
            coefficients. Default: the last accepted release in `output.history` that used this
            vector. Either also confirms what a fine-tune of that release says it carries.
        max_evaluations: Upper limit of loss-and-gradient evaluations of the search.
        benign_weight: η, weight of the term on benign prompts in the objective.
        utility_weight: β, weight of the divergence from the fine-tuned model in the objective. More
            of it keeps the fine-tune more closely, the harm that poisoned data has done to it
            included.
        utility_temperature: T, at least 1, of that divergence's second, softened part, which also
            sees answers move that the fine-tune is sure of (arXiv 1503.02531). 1 leaves that part
            out.
        sparsity_weight: γ, weight of Σλ in the objective.
        max_utility_loss: Largest KL divergence from the fine-tuned model accepted on held-out task
            samples, in nats per response token.

    Raises:
        ConfigError: A name is no setting (the nearest one is named), or a value is impossible.
    """

    granularity: Granularity = "module"
    min_coefficient: float = 0.0
    max_coefficient: float = 2.0
    initial_coefficient: float | None = None
    warm_start: str | None = None
    max_evaluations: int = 10
    benign_weight: float = 1.0
    utility_weight: float = 1.0
    utility_temperature: float = 2.0
    sparsity_weight: float = 0.0
    max_utility_loss: float = 0.1

    RULES: ClassVar[Mapping[str, Rule]] = {
        "initial_coefficient": Rule(may_be_null=True),
        "max_coefficient": Rule(at_most=LARGEST_COEFFICIENT),
        "warm_start": Rule(may_be_null=True),
        "max_evaluations": _COUNT,
        "benign_weight": _WEIGHT,
        "utility_weight": _WEIGHT,
        "utility_temperature": Rule(at_least=1.0),
        "sparsity_weight": _WEIGHT,
        "max_utility_loss": _WEIGHT,
    }

    @property
    def start(self) -> float:
        """Initial value of every coefficient, inside the bounds."""
        wanted = 0.3 if self.initial_coefficient is None else self.initial_coefficient
        return min(max(wanted, self.min_coefficient), self.max_coefficient)

    def __post_init__(self) -> None:
        check_values(self, prefix="search.")
        for name in ("min_coefficient", "max_coefficient"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(
                    f"`search.{name}` is {value}: coefficients are never negative, because −V removes refusals."
                )
        low, high, first = self.min_coefficient, self.max_coefficient, self.initial_coefficient
        if low >= high:
            raise ConfigError(
                f"`search.min_coefficient` ({low}) must be smaller than `search.max_coefficient` ({high}): "
                "swap or widen the bounds."
            )
        if first is not None and not low <= first <= high:
            raise ConfigError(
                f"`search.initial_coefficient` is {first}: it must lie between {low} and {high}."
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

    Raises:
        ConfigError: A name is no setting (the nearest one is named), or a value is impossible.
    """

    num_test_prompts: int = 64
    max_new_tokens: int = 32

    RULES: ClassVar[Mapping[str, Rule]] = {
        "num_test_prompts": _COUNT_OR_NONE,
        "max_new_tokens": _COUNT,
    }

    def __post_init__(self) -> None:
        check_values(self, prefix="measure.")


@named_fields
@dataclass
class OutputConfig:
    """What is written, and where.

    Args:
        output_dir: Where the safeguarded checkpoint goes. Default: `safeguarded` in the trainer's
            output directory.
        output_format: A full `merged` checkpoint, a LoRA `adapter` with its coefficients folded in,
            or `both` (the adapter in the subfolder `adapter`).
        max_shard_size: Largest weight file, like `5GB` or `500MB`; a whole number is bytes.
        history: JSON-lines file of the model line; what came of this fine-tune is appended to it.
            Its seal lies beside it.
        hub_model_id: Repository on the hub that the finished checkpoint is uploaded to, unless it
            is rejected. `Trainer`'s own `push_to_hub` uploads the plain fine-tune.
        hub_private: Whether a repository made for it is private.

    Raises:
        ConfigError: A name is no setting (the nearest one is named), or a value is impossible.
    """

    output_dir: str | None = None
    output_format: OutputFormat = "merged"
    max_shard_size: str = "5GB"
    history: str | None = None
    hub_model_id: str | None = None
    hub_private: bool = True

    RULES: ClassVar[Mapping[str, Rule]] = {
        "output_dir": Rule(syntax=folder, may_be_null=True),
        "max_shard_size": Rule(syntax=file_size),
        "history": Rule(syntax=written_place),
        "hub_model_id": Rule(syntax=repository, may_be_null=True),
    }

    def __post_init__(self) -> None:
        size: object = self.max_shard_size  # a recipe may have a number
        if type(size) is int and size > 0:
            self.max_shard_size = f"{size / 1000}KB"
        check_values(self, prefix="output.")


GROUPS: dict[str, type[Settings]] = {
    "data": DataConfig,
    "search": SearchConfig,
    "measure": MeasureConfig,
    "output": OutputConfig,
}
