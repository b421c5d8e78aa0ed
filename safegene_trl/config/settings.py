"""`SafeGeneConfig`: everything a user can set about recalibrating and saving one fine-tune."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from ..errors import ConfigError
from .gate import GateConfig
from .validation import (
    LARGEST_COUNT,
    Rule,
    check_values,
    check_written,
    file_size,
    folder,
    named_fields,
    reject_unknown_keys,
    repository,
    written_place,
)


Granularity = Literal["layer", "module", "rank"]  # from coarse to fine
OutputFormat = Literal["merged", "adapter", "both"]
OnFailure = Literal["raise", "warn"]
LARGEST_COEFFICIENT = (
    100.0  # of any coefficient, wherever it comes from; ten times the vector is far beyond use already
)
_COUNT, _WEIGHT = Rule(at_least=1, at_most=LARGEST_COUNT), Rule(at_least=0.0)


@named_fields
@dataclass
class SafeGeneConfig:
    """How one fine-tune takes on its family's safety vector.

    Args:
        vector: Directory or hub id of the safety vector.
        vector_revision: Branch, tag or commit of the vector on the hub.
        public_key: PEM file of the key that the vector must be signed with; checked before anything of it is read.
        require_signature: Refuse to run without a `public_key`.
        allow_other_base: Go on if the fine-tune started from other weights than the vector's aligned model, or from another
            revision of it. The report says so.
        safety_data: Dataset of harmful prompts, with or without refusals (local JSON/JSONL/CSV/Parquet file,
            `datasets` directory or hub id, `ID:CONFIG@SPLIT` where it has several). Default: the prompts and refusals that come
            with the vector.
        safety_data_split: Split of `safety_data` to read.
        task_data: Dataset the utility term is measured on, in any TRL format. Default: the training set.
        task_data_split: Split of `task_data` to read.
        num_safety_shots: Harmful prompts used in all, held-out ones included.
        num_task_shots: Task samples used in all, held-out ones included.
        num_benign_shots: Benign prompts of the vector used in all to keep the model from over-refusing.
        holdout_share: Share (0–1) of the shots kept out of the optimisation, for the acceptance decision.
        granularity: One coefficient per `layer` (SafeGene's own), per `module`, or per `rank`: for each of the r rank-one parts of a
            module's delta.
        min_coefficient: Lower bound of every coefficient; never below 0, because −V removes refusals.
        max_coefficient: Upper bound of every coefficient.
        initial_coefficient: Where the search starts. Default: 0.3, or the nearest bound.
        max_evaluations: Upper limit of loss-and-gradient evaluations of the search.
        benign_weight: η, weight of the term on benign prompts in the objective.
        utility_weight: β, weight of the divergence from the fine-tuned model in the objective. More of it keeps the fine-tune more closely, the harm that poisoned
            data has done to it included.
        utility_temperature: T, at least 1, of that divergence's second, softened part, which also sees answers move that the fine-tune is
            sure of (arXiv 1503.02531). 1 leaves that part out.
        sparsity_weight: γ, weight of Σλ in the objective.
        max_utility_loss: Largest KL divergence from the fine-tuned model accepted on held-out task samples, in nats
            per response token.
        max_length: Task and benign samples are cut to this many tokens. Harmful prompts are never cut.
        max_refusal_tokens: The safety terms read this many first tokens of a refusal or benign answer: whether a model
            refuses is settled there (arXiv 2406.05946).
        max_response_tokens: The utility term reads at most this many response tokens of a sample.
        batch_size: Samples per forward pass. Default: 8 on a CPU, on a GPU what its free memory is for. Halved where memory runs out.
        num_test_prompts: How many harmful prompts, benign prompts and task samples, of each and at most, the model is measured on
            before and after: none of those that the coefficients were fitted on. 0 leaves measuring out.
        max_new_tokens: Tokens generated for each answer.
        gate: Limits on what is measured, and data of its own to measure on (see `GateConfig`).
        warm_start: An earlier release's report, or its folder: the search starts at its coefficients. Default: the last accepted
            release in `history` that used this vector. Either also confirms what a fine-tune of that release says it carries.
        history: JSON-lines file of the model line; what came of this fine-tune is appended to it. Its seal lies beside it.
        output_dir: Where the safeguarded checkpoint goes. Default: `safeguarded` in the trainer's output directory.
        output_format: A full `merged` checkpoint, a LoRA `adapter` with its coefficients folded in, or `both` (the
            adapter in the subfolder `adapter`).
        max_shard_size: Largest weight file, like `5GB` or `500MB`; a whole number is bytes.
        hub_model_id: Repository on the hub that the finished checkpoint is uploaded to, unless it is rejected. `Trainer`'s own
            `push_to_hub` uploads the plain fine-tune.
        hub_private: Whether a repository made for it is private.
        dry_run: Check everything before the first training step, then stop the training.
        on_failure: `raise` stops the script; `warn` ends the fine-tune normally, the report says what failed.
        seed: Seed for drawing shots.
    """

    vector: str = ""
    vector_revision: str | None = None
    public_key: str | None = None
    require_signature: bool = False
    allow_other_base: bool = False
    safety_data: str | None = None
    safety_data_split: str = "train"
    task_data: str | None = None
    task_data_split: str = "train"
    num_safety_shots: int = 32
    num_task_shots: int = 32
    num_benign_shots: int = 32
    holdout_share: float = 0.25
    granularity: Granularity = "module"
    min_coefficient: float = 0.0
    max_coefficient: float = 2.0
    initial_coefficient: float | None = None
    max_evaluations: int = 10
    benign_weight: float = 1.0
    utility_weight: float = 1.0
    utility_temperature: float = 2.0
    sparsity_weight: float = 0.0
    max_utility_loss: float = 0.1
    max_length: int = 512
    max_refusal_tokens: int = 8
    max_response_tokens: int = 64
    batch_size: int | None = None
    num_test_prompts: int = 64
    max_new_tokens: int = 32
    gate: GateConfig | None = None  # a mapping, as a recipe has it, becomes one
    warm_start: str | None = None
    history: str | None = None
    output_dir: str | None = None
    output_format: OutputFormat = "merged"
    max_shard_size: str = "5GB"
    hub_model_id: str | None = None
    hub_private: bool = True
    dry_run: bool = False
    on_failure: OnFailure = "raise"
    seed: int = 0

    RULES: ClassVar[Mapping[str, Rule]] = {
        "num_safety_shots": _COUNT,
        "num_task_shots": _COUNT,
        "num_benign_shots": Rule(at_least=0, at_most=LARGEST_COUNT),
        "holdout_share": Rule(at_least=0.0),
        "initial_coefficient": Rule(may_be_null=True),
        "max_coefficient": Rule(at_most=LARGEST_COEFFICIENT),
        "max_evaluations": _COUNT,
        "benign_weight": _WEIGHT,
        "utility_weight": _WEIGHT,
        "utility_temperature": Rule(at_least=1.0),
        "sparsity_weight": _WEIGHT,
        "max_utility_loss": _WEIGHT,
        "max_length": _COUNT,
        "max_refusal_tokens": _COUNT,
        "max_response_tokens": _COUNT,
        "batch_size": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "num_test_prompts": Rule(at_least=0, at_most=LARGEST_COUNT),
        "max_new_tokens": _COUNT,
        "warm_start": Rule(may_be_null=True),
        "history": Rule(syntax=written_place),
        "output_dir": Rule(syntax=folder, may_be_null=True),
        "max_shard_size": Rule(syntax=file_size),
        "hub_model_id": Rule(syntax=repository, may_be_null=True),
        "seed": Rule(at_least=0, at_most=2**32 - 1),
    }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SafeGeneConfig":
        """Builds a config from a block that somebody wrote.

        Raises:
            ConfigError: A key is unknown (the nearest known one is named), has no value, or one that is impossible.
        """
        check_written(values, cls, where="the safegene block")
        if isinstance(gate := values.get("gate"), Mapping):
            check_written(gate, GateConfig, where="the gate block")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def start(self) -> float:
        """Initial value of every coefficient, inside the bounds."""
        wanted = 0.3 if self.initial_coefficient is None else self.initial_coefficient
        return min(max(wanted, self.min_coefficient), self.max_coefficient)

    def __post_init__(self):
        if isinstance(self.gate, dict):
            if not self.gate:
                raise ConfigError("`gate` is empty: set a limit in it, or leave it out.")
            reject_unknown_keys(self.gate, list(GateConfig.__dataclass_fields__), where="the gate block")
            self.gate = GateConfig(**self.gate)
        if type(self.max_shard_size) is int and self.max_shard_size > 0:
            self.max_shard_size = f"{self.max_shard_size / 1000}KB"
        if not self.vector:
            raise ConfigError("No safety vector is named: set `vector` to a directory or hub id.")
        check_values(self)
        if self.require_signature and self.public_key is None:
            raise ConfigError(
                "`require_signature` is set without a `public_key`: name the PEM file of the maker's key."
            )
        if not 0.0 < self.holdout_share < 1.0:
            raise ConfigError(f"`holdout_share` is {self.holdout_share}: it must lie strictly between 0 and 1.")
        for name in ("num_safety_shots", "num_task_shots"):
            if getattr(self, name) < 2:
                raise ConfigError(f"`{name}` is 1: at least 2 are needed, one of them held out.")
        self._check_bounds()
        if self.gate and self.gate.limits and not self.num_test_prompts:
            raise ConfigError(
                "The gate has limits and `num_test_prompts` is 0: there would be nothing to hold them against."
            )

    def _check_bounds(self):
        for name in ("min_coefficient", "max_coefficient"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(
                    f"`{name}` is {value}: coefficients are never negative, because −V removes refusals."
                )
        if self.min_coefficient >= self.max_coefficient:
            raise ConfigError(
                f"`min_coefficient` ({self.min_coefficient}) must be smaller than `max_coefficient` "
                f"({self.max_coefficient}): swap or widen the bounds."
            )
        first = self.initial_coefficient
        if first is not None and not self.min_coefficient <= first <= self.max_coefficient:
            raise ConfigError(
                f"`initial_coefficient` is {first}: it must lie between {self.min_coefficient} and {self.max_coefficient}."
            )
