"""`safegene_report.json`: what was used, what was found, what was decided. The schema is
`report.schema.json`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoints.contents import MARKER
from ..config.metrics import METRICS
from ..text import strict_json
from .cards import checkpoint_card
from .html import render
from .plots import coefficients_plot, history_plot


logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
SCHEMA: dict[str, Any] = json.loads(
    files(__package__).joinpath("report.schema.json").read_text(encoding="utf-8")
)


@dataclass
class Report:
    """All that is known of one safety step; what is not known yet, or not at all, is None.

    Attributes:
        config: The settings.
        vector: Name, signer and record of the safety vector.
        base: The checkpoint that the fine-tune started from.
        model: Kind of fine-tune and family.
        launch: Processes, and how the model is spread over them.
        software: Versions.
        warnings: What is right but surprising.
        data: The samples: source, hash and number, and what could not be read.
        coefficients: λ by name, of the whole vector in the weights.
        held_out: Losses before and after, nats per response token.
        history: The search's evaluations.
        search: How the search's passes were made: size of the batches, and what stayed in memory
            between them.
        untouched: Names of coefficients that no sample reached.
        repair: How far the repair went, and why; None where no touch-up was asked for.
        measured: Answers and accuracy before and after (see `metrics.METRICS`).
        decision: Outcome and reason.
        shipped: How the shipped weights differ from what was intended and from what was measured.
        files: SHA-256 of every written file, but for the report, its pages and the model card.
        fine_tune: Where the plain fine-tune lies.
        status: `prepared`, `safeguarded` or `failed`.
        error: Of a failed step: kind and sentence.
        phases: Seconds and peak memory (MiB) by phase.
    """

    config: dict[str, Any]
    vector: dict[str, Any]
    base: dict[str, Any]
    model: dict[str, Any]
    launch: dict[str, Any]
    software: dict[str, str]
    warnings: list[str]
    data: dict[str, Any] | None = None
    coefficients: dict[str, float] | None = None
    held_out: dict[str, dict[str, float]] | None = None
    history: list[dict[str, Any]] | None = None
    search: dict[str, Any] | None = None
    untouched: list[str] | None = None
    repair: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    decision: dict[str, Any] | None = None
    shipped: dict[str, Any] | None = None
    files: dict[str, str] | None = None
    fine_tune: str | None = None
    status: str = "prepared"
    error: dict[str, str] | None = None
    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The content of `safegene_report.json`."""
        known = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found = {"schema_version": SCHEMA_VERSION} | {
            name: value for name, value in known.items() if value is not None
        }
        return {name: found[name] for name in SCHEMA["properties"] if name in found}


def write_report(
    report: dict[str, Any], path: Path, releases: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes a report as JSON at `path`, as a page beside it, and as PNG plots where matplotlib is
    installed.

    Args:
        report: The report.
        path: A JSON file.
        releases: The model line that it is the newest release of.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(strict_json(report) + "\n", encoding="utf-8")
    path.with_suffix(".html").write_text(render(report, releases), encoding="utf-8")
    if find_spec("matplotlib"):
        try:
            # all alike, as where one number was given, they need no picture
            if len(set((report.get("coefficients") or {}).values())) > 1:
                coefficients_plot(report["coefficients"], path.with_suffix(".coefficients.png"))
            if len(releases) > 1:
                history_plot(releases, path.with_suffix(".history.png"))
        except (
            Exception
        ) as error:  # a picture that cannot be drawn is no reason to lose a checkpoint
            logger.warning("The plots beside %s could not be drawn: %s", path, error)


def write_evidence(
    report: dict[str, Any], folder: Path, name: str, releases: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes the report and the model card into a safeguarded checkpoint's folder.

    Args:
        report: The report.
        folder: Where the checkpoint is being written.
        name: The checkpoint's name.
        releases: The model line that it is the newest release of.
    """
    write_report(report, folder / MARKER, releases)
    checkpoint_card(report, name).save(folder / "README.md")


def scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """The report's main numbers under names for trackers. `safegene/outcome`: 2 accepted, 1 best
    effort, 0 rejected, −1 failed.
    """
    outcome = (report.get("decision") or {}).get("outcome", "failed")
    if report.get("status") == "failed" and outcome != "rejected":  # decided, and then not written
        outcome = "failed"
    found = {
        "outcome": float(
            ("failed", "rejected", "accepted_best_effort", "accepted").index(outcome) - 1
        )
    }
    for side in ("before", "after"):
        for metric in METRICS.values():
            if share := metric.measured(report.get("measured", {}), side):
                found[metric.key if metric.difference else f"{metric.key}_{side}"] = share["share"]
        for name, loss in report.get("held_out", {}).get(side, {}).items():
            found[f"held_out_{name}_{side}"] = loss
    if coefficients := list(report.get("coefficients", {}).values()):
        found |= {
            "mean_coefficient": sum(coefficients) / len(coefficients),
            "largest_coefficient": max(coefficients),
        }
    found |= {
        f"{name}_seconds": phase["seconds"] for name, phase in report.get("phases", {}).items()
    }
    return {f"safegene/{name}": float(value) for name, value in found.items()}
