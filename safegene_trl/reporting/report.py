"""`safegene_report.json`: what was used, what was found, what was decided. The schema is `report.schema.json`."""

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.output import MARKER
from ..config.metrics import METRICS
from ..text import printable, strict_json
from .cards import checkpoint_card
from .html import render
from .plots import coefficients_plot, history_plot
from .verdict import verdict


logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
SCHEMA: dict[str, Any] = json.loads(files(__package__).joinpath("report.schema.json").read_text(encoding="utf-8"))


_PROCESS = Path("/proc/self")


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
        search: How the search's passes were made: size of the batches, and what stayed in memory between them.
        untouched: Names of coefficients that no sample reached.
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


class PhaseClock:
    """Wall-clock seconds and peak memory (MiB) of each phase of a run."""

    def __init__(self):
        self.phases: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the block as (a further) part of phase `name`: accelerator memory where there is one, else the process's resident peak."""
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                _PROCESS.joinpath("clear_refs").write_text("5")  # forgets the resident peak so far
        started = time.perf_counter()
        try:
            yield
        finally:
            peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_resident_bytes()
            before = self.phases.get(name, {"seconds": 0.0, "peak_memory_mib": 0.0})
            self.phases[name] = {
                "seconds": round(before["seconds"] + time.perf_counter() - started, 3),
                "peak_memory_mib": max(before["peak_memory_mib"], round(peak / 2**20, 1)),
            }


def write_report(report: dict[str, Any], path: Path, releases: Sequence[dict[str, Any]] = ()) -> None:
    """Writes a report as JSON at `path`, as a page beside it, and as PNG plots where matplotlib is installed.

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
            if report.get("coefficients"):
                coefficients_plot(report["coefficients"], path.with_suffix(".coefficients.png"))
            if len(releases) > 1:
                history_plot(releases, path.with_suffix(".history.png"))
        except Exception as error:  # a picture that cannot be drawn is no reason to lose a checkpoint
            logger.warning("The plots beside %s could not be drawn: %s", path, error)


def write_evidence(report: dict[str, Any], folder: Path, name: str, releases: Sequence[dict[str, Any]] = ()) -> None:
    """Writes the report and the model card into a safeguarded checkpoint's folder.

    Args:
        report: The report.
        folder: Where the checkpoint is being written.
        name: The checkpoint's name.
        releases: The model line that it is the newest release of.
    """
    write_report(report, folder / MARKER, releases)
    checkpoint_card(report, name).save(folder / "README.md")


def summary(report: Mapping[str, Any]) -> str:
    """The outcome in a few lines for a terminal: reason, vector, and what was measured before and after with 95 % intervals."""
    decision, model = report["decision"], report["model"]
    lines = [
        f"{verdict(report)}: {printable(decision['reason'])}",
        f"vector {printable(report['vector']['name'])}, model {printable(model['architecture'])} ({model['kind']} fine-tune)",
    ]
    if held_out := report.get("held_out"):
        before, after = held_out["before"], held_out["after"]
        lines.append(
            f"held-out safety loss {before['safety']:.3f} → {after['safety']:.3f} nats, "
            f"task divergence {after['utility']:.4f} nats"
        )
    measured = report.get("measured", {})
    for metric in METRICS:
        if (after := metric.measured(measured)) is None:
            continue
        interval = f"[{after['low']:.1%}, {after['high']:.1%}]"
        if (before := metric.measured(measured, "before")) is None:
            lines.append(
                f"task token accuracy lost {after['share']:.1%} {interval} on {after['count']} unseen samples"
            )
        else:
            shares = f"{before['share']:.0%} → {after['share']:.0%} [{after['low']:.0%}, {after['high']:.0%}]"
            lines.append(f"{metric.words} {shares} of {after['count']} unseen prompts")
    return "\n".join(lines)


def announcement(report: Mapping[str, Any], target: Path) -> str:
    """What is printed of a step that has written a checkpoint: the summary, then what lies where.

    Args:
        report: The step's report.
        target: Folder of the checkpoint.
    """
    if report["decision"]["outcome"] != "rejected":
        return f"{summary(report)}\nSafeguarded checkpoint: {target}"
    return (
        f"{summary(report)}\nRejected checkpoint, to look into and not to use: {target} (report: {target / MARKER})\n"
        f"Plain fine-tune: {printable(report['fine_tune'])}"
    )


def scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """The report's main numbers under names for trackers. `safegene/outcome`: 2 accepted, 1 best effort, 0 rejected, −1 failed."""
    outcome = (report.get("decision") or {}).get("outcome", "failed")
    if report.get("status") == "failed" and outcome != "rejected":  # decided, and then not written
        outcome = "failed"
    found = {"outcome": float(("failed", "rejected", "accepted_best_effort", "accepted").index(outcome) - 1)}
    for side in ("before", "after"):
        for metric in METRICS:
            if share := metric.measured(report.get("measured", {}), side):
                found[metric.key if metric.difference else f"{metric.key}_{side}"] = share["share"]
        for name, loss in report.get("held_out", {}).get(side, {}).items():
            found[f"held_out_{name}_{side}"] = loss
    if coefficients := list(report.get("coefficients", {}).values()):
        found |= {"mean_coefficient": sum(coefficients) / len(coefficients), "largest_coefficient": max(coefficients)}
    found |= {f"{name}_seconds": phase["seconds"] for name, phase in report.get("phases", {}).items()}
    return {f"safegene/{name}": float(value) for name, value in found.items()}


def _peak_resident_bytes() -> int:
    """On Linux by the process itself: `getrusage` counts what its parent held when it started it."""
    with suppress(OSError, StopIteration):
        lines = _PROCESS.joinpath("status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
