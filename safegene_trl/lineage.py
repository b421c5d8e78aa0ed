"""What a checkpoint says about the vector in its weights, so that a vector is never added twice.

A safeguarded checkpoint's `config.json` names its vector and coefficients, and a fine-tune of it inherits that entry. Such a
fine-tune is *re-based*: its coefficients stay those of the whole vector, bounds included, and only their change is added.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from .config import Granularity
from .errors import ConfigError, FamilyError
from .output import MARKER
from .vector import SafetyVector
from .vector_files import WEIGHTS_FILE
from .weights import base_model


CONFIG_KEY = "safegene"
Coefficients = dict[str, float]


def mark(vector: SafetyVector, coefficients: Mapping[str, float]) -> dict[str, Any]:
    """What goes into the `config.json` of a checkpoint that holds the vector with these coefficients."""
    return {CONFIG_KEY: {"vector": vector_id(vector), "coefficients": dict(coefficients)}}


def vector_id(vector: SafetyVector) -> str | None:
    """SHA-256 of the vector's weights: what coefficients belong to. None for one that was never saved."""
    return vector.files.get(WEIGHTS_FILE, {}).get("sha256")


def carried_coefficients(model: nn.Module, vector: SafetyVector, granularity: Granularity) -> Coefficients:
    """The coefficients with which the model's weights hold the vector already, by name; all 0 where it holds none.

    Raises:
        FamilyError: It holds another vector, or this one with coefficients of another granularity.
    """
    space = vector.space(granularity)
    entry = getattr(base_model(model).config, CONFIG_KEY, None)
    if entry is None:
        return dict.fromkeys(space.names, 0.0)
    try:
        found = {str(name): float(value) for name, value in entry["coefficients"].items()}
        sound = all(math.isfinite(value) and value >= 0 for value in found.values())
        same = entry["vector"] == vector_id(vector)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FamilyError(
            f"The entry `{CONFIG_KEY}` in the model's config.json is damaged: start from the checkpoint as it was written."
        ) from error
    if not same:
        raise FamilyError(
            "The fine-tune started from a checkpoint that holds another safety vector: fine-tune the plain checkpoint, or go on "
            "with the vector that is in it."
        )
    fitting = space.refined(found)
    if not sound or fitting is None:
        raise FamilyError(
            "The fine-tune started from a checkpoint that holds this vector with other kinds of coefficients: set `granularity` to "
            "that of the earlier release."
        )
    return fitting


def carries_vector(model: nn.Module) -> bool:
    """Whether the model says that its weights hold a vector."""
    return getattr(base_model(model).config, CONFIG_KEY, None) is not None


def check_not_safeguarded(name_or_path: str, revision: str | None = None) -> None:
    """Raises `ConfigError` for a checkpoint or adapter that a safety step has written."""
    path = Path(name_or_path)
    if not path.is_dir():
        try:
            hf_hub_download(name_or_path, MARKER, revision=revision)
        except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError):
            return
    elif not (path / MARKER).is_file():
        return
    raise ConfigError(
        f"{name_or_path} is a safeguarded checkpoint already: name the fine-tune that it was made from, or fine-tune it first."
    )


def reported_coefficients(given: str, vector: SafetyVector) -> Coefficients:
    """The coefficients in the report of an earlier safety step with this vector: a file, or the folder it lies in.

    Raises:
        ConfigError: There is no such report, or it is about another vector.
    """
    path = Path(given) / MARKER if Path(given).is_dir() else Path(given)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = {str(name): float(value) for name, value in report["coefficients"].items()}
        weights = report["vector"]["files"].get(WEIGHTS_FILE, {}).get("sha256")
    except OSError as error:
        raise ConfigError(f"{path} is no readable report of a safety step: name a {MARKER} or its folder.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no report of a safety step: name a {MARKER} or its folder.") from error
    if weights != vector_id(vector):
        raise ConfigError(f"{path} is about another safety vector: coefficients mean nothing beside another vector.")
    return found


def check_no_subtraction(change, carried=None):
    pass
