"""`SafeGeneConfig`: everything a user can set about recalibrating and saving one fine-tune."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field
from typing import Any, ClassVar, Literal

from ..errors import ConfigError
from .data import DataConfig
from .docstrings import meanings
from .flat_keys import GROUPS, PLACES, grouped, warn_of_flat_keys
from .gate import GateConfig
from .measure import MeasureConfig
from .output import OutputConfig
from .search import SearchConfig
from .validation import (
    LARGEST_COUNT,
    Rule,
    Settings,
    check_values,
    check_written,
    hint_of,
    names_of,
    reject_unknown_keys,
)


OnFailure = Literal["raise", "warn"]
BLOCKS: dict[str, type[Settings]] = {**GROUPS, "gate": GateConfig}
_ELSEWHERE = {
    **{name: f"gate.{name}" for name in names_of(GateConfig)},
    **PLACES,
}  # for who names a key without its group


def _takes_flat_keys(kind: type["SafeGeneConfig"]) -> type["SafeGeneConfig"]:
    """Decorates the dataclass: keys from before there were groups go where they belong, with a
    warning; others are refused.
    """
    settings: Any = kind
    made = settings.__init__

    @functools.wraps(made)
    def moved(self: Any, *args: Any, **values: Any) -> None:
        values, flat = grouped(values)
        reject_unknown_keys(values, names_of(settings), kind.__name__, elsewhere=_ELSEWHERE)
        warn_of_flat_keys(flat)
        made(self, *args, **values)

    def set_known(self: Any, name: str, value: Any) -> None:
        if not name.startswith("_"):
            names = names_of(settings)
            reject_unknown_keys({name: value}, names, kind.__name__, elsewhere=_ELSEWHERE)
        object.__setattr__(self, name, value)

    settings.__init__ = moved
    settings.__setattr__ = set_known
    return kind


@_takes_flat_keys
@dataclass
class SafeGeneConfig:
    """How one fine-tune takes on its family's safety vector. A group may be given as a mapping of
    its keys.

    Args:
        vector: Directory or hub id of the safety vector.
        vector_revision: Branch, tag or commit of the vector on the hub.
        public_key: PEM file of the key that the vector must be signed with; checked before anything
            of it is read.
        require_signature: Refuse to run without a `public_key`.
        allow_other_base: Go on if the fine-tune started from other weights than the vector's
            aligned model, or from another revision of it. The report says so.
        data: Samples to fit and to decide on (see `DataConfig`).
        search: The search for the coefficients (see `SearchConfig`).
        measure: What is measured before and after (see `MeasureConfig`).
        gate: Limits on what is measured, and data of its own to measure on (see `GateConfig`).
        output: What is written, and where (see `OutputConfig`).
        batch_size: Samples per forward pass. Default: 8 on a CPU, on a GPU what its free memory is
            for. Halved where memory runs out.
        dry_run: Check everything before the first training step, then stop the training.
        on_failure: `raise` stops the script; `warn` ends the fine-tune normally, the report says
            what failed. `safegene apply` has no training to end, and always raises.
        seed: Seed for drawing shots.

    Raises:
        ConfigError: A name is no setting (the nearest one is named), or a value is missing,
            impossible, or contradicts another one.
    """

    vector: str = ""
    vector_revision: str | None = None
    public_key: str | None = None
    require_signature: bool = False
    allow_other_base: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    gate: GateConfig | None = None
    output: OutputConfig = field(default_factory=OutputConfig)
    batch_size: int | None = None
    dry_run: bool = False
    on_failure: OnFailure = "raise"
    seed: int = 0

    RULES: ClassVar[Mapping[str, Rule]] = {
        "batch_size": Rule(at_least=1, at_most=LARGEST_COUNT, may_be_null=True),
        "seed": Rule(at_least=0, at_most=2**32 - 1),
    }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SafeGeneConfig":
        """Builds a config from a block that somebody wrote.

        Args:
            values: Keys and values, as in a recipe's `safegene` block.

        Raises:
            ConfigError: A key is unknown (the nearest known one is named), has no value, or one
                that is impossible.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("The safegene block must be a block of keys and values.")
        values, flat = grouped(values)
        check_written(values, cls, where="the safegene block", elsewhere=_ELSEWHERE)
        for name, kind in BLOCKS.items():
            if isinstance(block := values.get(name), Mapping):
                check_written(block, kind, where=f"the {name} block", elsewhere=_ELSEWHERE)
        warn_of_flat_keys(flat)
        return cls(**values)

    def check(self) -> None:
        """Raises `ConfigError` for what was set after it was made and cannot be."""
        self.__post_init__()
        for name in BLOCKS:
            if (block := getattr(self, name)) is not None:
                block.__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, groups as mappings; `SafeGeneConfig(**values)` brings them
        back.
        """
        return asdict(self)

    def __post_init__(self) -> None:
        for name, kind in BLOCKS.items():
            block = getattr(self, name)
            if isinstance(block, Mapping):
                if not block:
                    raise ConfigError(f"`{name}` is empty: set a key in it, or leave it out.")
                reject_unknown_keys(
                    block, names_of(kind), where=f"the {name} block", elsewhere=_ELSEWHERE
                )
                setattr(self, name, kind(**block))
        if not self.vector:
            raise ConfigError("No safety vector is named: set `vector` to a directory or hub id.")
        check_values(self)
        if self.require_signature and self.public_key is None:
            raise ConfigError(
                "`require_signature` is set without a `public_key`: name the PEM file of the maker's key."
            )
        if self.gate and self.gate.names and not self.measure.num_test_prompts:
            raise ConfigError(
                "The gate has limits and `measure.num_test_prompts` is 0: there would be nothing to hold them against."
            )


def hint_at(path: str) -> Any:
    """The type hint of the setting at a path like `search.max_evaluations`, or with a flat key;
    None of a whole group.
    """
    group, _, name = PLACES.get(path, path).rpartition(".")
    if group:
        return hint_of(BLOCKS[group], name)
    return None if name in BLOCKS else hint_of(SafeGeneConfig, name)


def described() -> Iterator[tuple[str, str]]:
    """The path of every setting, groups included, and what it means, with its default; for
    `--help`.
    """
    for name, meaning in _with_defaults(SafeGeneConfig):
        yield name, f"{meaning} A block of keys and values." if name in BLOCKS else meaning
        if name in BLOCKS:
            yield from ((f"{name}.{key}", text) for key, text in _with_defaults(BLOCKS[name]))


def _with_defaults(kind: type[Settings]) -> Iterator[tuple[str, str]]:
    for name, meaning in meanings(kind).items():
        default = kind.__dataclass_fields__[name].default
        yield name, meaning if default in (None, "", MISSING) else f"{meaning} (default: {default})"
