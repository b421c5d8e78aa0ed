"""What a safety vector says of itself, all its files checked: everything but its weights, so that
nothing here needs torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.names import layers_of
from .family import Family
from .files import (
    CONFIG_FILE,
    PROMPTS_FILE,
    SIGNED_FILES,
    WEIGHTS_FILE,
    check_consistent,
    check_files,
    read_config,
    read_prompts,
)
from .signing import SIGNATURE_FILE, verify
from .weights import check_weights


@dataclass(frozen=True)
class VectorRecord:
    """A vector that is whole; see `SafetyVector` for what the attributes mean.

    Attributes:
        modules: Canonical names of the modules that it changes, in natural order.
        rank: Of every module's delta.
    """

    modules: list[str]
    rank: int
    family: Family
    aligned_model: dict[str, Any]
    degraded_model: dict[str, Any]
    extraction: dict[str, Any]
    selection: dict[str, Any]
    software: dict[str, str]
    files: dict[str, dict[str, Any]]
    prompts: list[dict[str, Any]]
    signature: bytes | None

    @property
    def layers(self) -> list[int]:
        """Indices of the layers it acts in, in order."""
        return layers_of(self.modules)

    @property
    def components(self) -> list[int]:
        """Ranks of its components, which have coefficients of their own; as a rule there is one."""
        return components_of(self.extraction, self.rank)

    @property
    def component_names(self) -> list[str]:
        """What they are called in the names of their coefficients."""
        return component_names_of(self.extraction, self.rank)


def components_of(extraction: Mapping[str, Any], rank: int) -> list[int]:
    """Ranks of a vector's components, by its record of how it was made."""
    return list(extraction.get("components", [rank]))


def component_names_of(extraction: Mapping[str, Any], rank: int) -> list[str]:
    """What a vector's components are called in the names of their coefficients: their numbers, where
    its record names none.
    """
    numbers = map(str, range(len(components_of(extraction, rank))))
    return list(extraction.get("component_names", numbers))


def shares_of_one(extraction: Mapping[str, Any], rank: int) -> list[float]:
    """By component, the coefficient with which the vector adds one whole difference to a degraded
    model: 1/K where K vectors were combined, at once or one after the other. The components that a
    vector was split into by category are that vector together and count as one.
    """
    wholes = sum(_wholes(extraction, rank))
    return [1 / wholes] * len(components_of(extraction, rank))


def _wholes(extraction: Mapping[str, Any], rank: int) -> list[int]:
    """Of each vector in it, how many whole differences its components with 1 add up to."""
    if parts := extraction.get("vectors"):
        made = [part["extraction"] for part in parts]
        return [count for each in made for count in _wholes(each, each["rank"])]
    return [1 if "by_category" in extraction else len(components_of(extraction, rank))]


def extractions(extraction: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How a vector, or each of those that were combined to it, was made."""
    found, left = [], [extraction]
    while left:
        made = left.pop()
        if parts := made.get("vectors"):
            left += [part["extraction"] for part in parts]
        else:
            found.append(made)
    return found


def refuses_as_another(extraction: Mapping[str, Any]) -> bool:
    """Whether the refusals that come with a vector, or with one of its components, are those of the
    model that its direction was carried over from, and not its aligned model's own.
    """
    return any(
        made.get("transport", {}).get("refusals", {}).get("from") == "source"
        for made in extractions(extraction)
    )


def read_record(
    contents: Mapping[str, bytes], name: str, public_key: Path | None = None
) -> VectorRecord:
    """From the bytes of a vector's files, as `files.read_files` gives them.

    Args:
        contents: The files' bytes by name.
        name: Where they come from, for messages.
        public_key: PEM file that the signature is checked with, before anything else is read.

    Raises:
        SignatureError: It is not signed, or not with that key, or was changed since.
        VectorError: Altered, truncated, of another format version, or with NaN or infinite values.
    """
    signature = contents.get(SIGNATURE_FILE)
    if public_key is not None:
        verify({file: contents[file] for file in SIGNED_FILES}, signature, public_key, name)
    config = read_config(contents[CONFIG_FILE], name)
    check_files(contents, name, config["files"])
    ranks = check_weights(contents[WEIGHTS_FILE], name)
    sections = {key: value for key, value in config.items() if key != "format_version"}
    record = VectorRecord(
        modules=list(ranks),
        rank=next(iter(ranks.values())),
        prompts=read_prompts(contents[PROMPTS_FILE], name, config),
        signature=signature,
        **sections | {"family": Family.from_dict(config["family"])},
    )
    check_consistent(config, record.rank, record.layers, name)
    return record
