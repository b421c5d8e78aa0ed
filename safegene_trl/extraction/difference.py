"""The difference of an aligned and a degraded model, taken from their files by one process."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.source import adapter_base
from ..checkpoints.stored_model import StoredModel
from ..models.low_rank import LowRankDelta
from ..provenance import model_reference
from .config import ExtractionConfig
from .coverage import Coverage, adapter_coverage
from .delta import adapter_delta, stored_difference
from .isolation import isolated
from .methods import METHODS
from .svd import Truncation


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredDifference:
    """The aligned model less the degraded one.

    Attributes:
        aligned: The aligned model, of which there is the structure.
        truncations: Low-rank deltas by module, and what they leave out.
        coverage: How much of the difference that is.
        isolation: What is to be said about the task models' directions; None without task models.
    """

    aligned: StoredModel
    truncations: dict[str, Truncation]
    coverage: Coverage
    isolation: dict[str, Any] | None

    @property
    def deltas(self) -> dict[str, LowRankDelta]:
        """The deltas alone."""
        return {name: truncation.delta for name, truncation in self.truncations.items()}


def take_difference(config: ExtractionConfig, show_progress: bool) -> StoredDifference:
    """Takes it, and warns where it covers little."""
    aligned = StoredModel.open(config.aligned_model, config.aligned_revision)
    name, revision = config.degraded_model, config.degraded_revision
    truncations, coverage = _difference(config, aligned, name, revision, show_progress)
    if warning := coverage.check():
        logger.warning(warning)
    truncations, isolation = _isolated(config, aligned, truncations, show_progress)
    return StoredDifference(aligned, truncations, coverage, isolation)


def truncation_record(selected: Mapping[str, Truncation]) -> dict[str, Any]:
    """What a vector says of how its deltas were truncated."""
    return {
        "exact": min(t.kept for t in selected.values()) == 1.0,
        "rank": next(iter(selected.values())).delta.a.shape[0],
        "energy_kept": {name: round(t.kept, 6) for name, t in selected.items()},
        "energy_optimum_at_most": {name: round(t.optimum, 6) for name, t in selected.items()},
    }


def differ_by_adapters(
    config: ExtractionConfig,
    aligned: StoredModel,
    other: StoredModel,
    name: str,
    revision: str | None,
) -> bool:
    """Whether the aligned model and another one, of this name, are one base model with nothing but
    LoRAs on it.
    """
    bases = {
        Path(base).resolve() if Path(base).is_dir() else base
        for base in (
            adapter_base(config.aligned_model, config.aligned_revision) or config.aligned_model,
            adapter_base(name, revision) or name,
        )
    }
    return len(bases) == 1 and not (aligned.has_full_rank_changes or other.has_full_rank_changes)


def _difference(
    config: ExtractionConfig,
    aligned: StoredModel,
    name: str,
    revision: str | None,
    show_progress: bool,
) -> tuple[dict[str, Truncation], Coverage]:
    """The aligned model less another one, and how much of their difference that is."""
    other = StoredModel.open(name, revision)
    # what distils trains a LoRA on modules, which these are not
    experts = not METHODS[config.method].distils
    if differ_by_adapters(config, aligned, other, name, revision):
        found = adapter_delta(aligned.model, other.model, config.rank, experts)
        return found, adapter_coverage(aligned, other, found)
    return stored_difference(
        aligned, other, config.rank or 8, config.exact_svd, config.seed, show_progress, experts
    )


def _isolated(
    config: ExtractionConfig,
    aligned: StoredModel,
    truncations: dict[str, Truncation],
    show_progress: bool,
) -> tuple[dict[str, Truncation], dict[str, Any] | None]:
    """The deltas without the task models' directions, and what is to be said about that; the same
    without task models.
    """
    if not config.isolate_from:
        return truncations, None
    tasks = []
    for name in config.isolate_from:
        difference, _ = _difference(config, aligned, name, None, show_progress)
        tasks.append({module: truncation.delta for module, truncation in difference.items()})
    deltas = {module: truncation.delta for module, truncation in truncations.items()}
    found, removed = isolated(deltas, tasks, config.isolation_rank)
    return found, {
        "task_models": [model_reference(name) for name in config.isolate_from],
        "rank": config.isolation_rank,
        "energy_removed": {module: round(share, 6) for module, share in removed.items()},
    }
