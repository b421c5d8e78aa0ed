"""What users set of the search for the coefficients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import ConfigError
from .validation import (
    COUNT,
    Rule,
    check_values,
    named_fields,
)


Granularity = Literal["layer", "module", "rank"]  # from coarse to fine
Repair = Literal["vector", "vector+touch-up"]  # from cheap to dear
# of any coefficient, wherever it comes from; ten times the vector is far beyond use already
LARGEST_COEFFICIENT = 100.0
INTERFERENCE = "interference"  # EnchTable's rule, in the place of coefficients

_WEIGHT = Rule(at_least=0.0)
_BOUND = Rule(
    at_least=0.0,
    at_most=LARGEST_COEFFICIENT,
    too_low="coefficients are never negative, because −V removes refusals",
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
            coefficients. Default: the last accepted release in `output.history`, if it used this
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
        repair: How far the repair goes. `vector` is the vector alone. `vector+touch-up` trains a
            low-rank touch-up beside it where the vector alone does not surely keep every limit of
            the `gate`, or no limit is set. It takes several times as long as the search.

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
    repair: Repair = "vector"

    RULES: ClassVar[Mapping[str, Rule]] = {
        "initial_coefficient": Rule(may_be_null=True),
        "min_coefficient": _BOUND,
        "max_coefficient": _BOUND,
        "warm_start": Rule(may_be_null=True),
        "max_evaluations": COUNT,
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
