"""The safety step on a finished model with coefficients that are known already: nothing is loaded
or measured.

What is wrong with the request or the files is said at once. Only then comes what takes seconds to
import: the model's own code, whose names and shapes say where the vector goes.
"""

from pathlib import Path
from typing import Any

from ..checkpoints.source import stored_weights
from ..config.settings import SafeGeneConfig
from ..errors import ConfigError
from .lineage import check_not_safeguarded


def safeguard_stored(
    config: SafeGeneConfig,
    name_or_path: str,
    revision: str | None,
    given: str,
    target: Path,
    base_model: str | None = None,
) -> dict[str, Any]:
    """Merges the vector into a finished checkpoint or adapter from its files; returns the report.

    Args:
        config: What to do; all about shots and the search is ignored, but that a touch-up is
            refused.
        name_or_path: Directory or hub id of the checkpoint or adapter.
        revision: Its branch, tag or commit on the hub.
        given: One number (the coefficient of every layer), or the report of an earlier safety step
            with this vector: a file, or the folder it lies in; or `interference`, EnchTable's rule.
        target: Folder of the checkpoint to be.
        base_model: The aligned model, from which `interference` tells a full fine-tune's own
            change.

    Raises:
        SafeGeneError: One of its kinds, before anything is written.
    """
    check_measures_nothing(config)
    if config.output.merge_base is not None:
        raise ConfigError(
            "`output.merge_base` is set beside `coefficients`, with which an adapter is merged into the base that its "
            "`adapter_config.json` names: name the 16-bit base there."
        )
    check_not_safeguarded(name_or_path, revision)
    files = stored_weights(name_or_path, revision)
    from .stored_fine_tune import merge_stored

    return merge_stored(config, name_or_path, revision, given, target, base_model, files)


def check_measures_nothing(config: SafeGeneConfig) -> None:
    """Raises `ConfigError` for limits of a gate, and for a touch-up: with given coefficients nothing
    is measured that could keep them, and nothing is learned.
    """
    if config.search.repair != "vector":
        raise ConfigError(
            f"`search.repair: {config.search.repair}` is set beside `coefficients`, with which nothing is learned: set it to "
            "`vector`, or leave out `coefficients`."
        )
    if config.gate and config.gate.names:
        raise ConfigError(
            f"`gate.{config.gate.names[0]}` is set beside `coefficients`, with which nothing is measured that could be held "
            "against it: leave out the gate's limits, or leave out `coefficients`."
        )
