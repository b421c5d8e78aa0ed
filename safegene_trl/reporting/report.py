"""`safegene_report.json`: what was used, what was found, what was decided. The schema is `report.schema.json`."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..output import MARKER
from .cards import checkpoint_card
from .html import render
from .plots import coefficients_plot, history_plot


SCHEMA_VERSION = 1
SCHEMA: dict[str, Any] = json.loads(files(__package__).joinpath("report.schema.json").read_text(encoding="utf-8"))


_PROCESS = Path("/proc/self")


class PhaseClock:
    """Wall-clock seconds and peak memory (MiB) of each phase of a run."""

    def __init__(self):
        self.phases: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the block as phase `name`: accelerator memory where there is one, else the process's resident peak."""
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
            self.phases[name] = {
                "seconds": round(time.perf_counter() - started, 3),
                "peak_memory_mib": round(peak / 2**20, 1),
            }


def write_report(report: dict[str, Any], path: Path, releases: Sequence[dict[str, Any]] = ()) -> None:
    """Writes a report as JSON at `path`, as a page beside it, and as PNG plots where matplotlib is installed.

    Args:
        report: The report.
        path: A JSON file.
        releases: The model line that it is the newest release of.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".html").write_text(render(report, releases), encoding="utf-8")
    if find_spec("matplotlib"):
        if report.get("coefficients"):
            coefficients_plot(report["coefficients"], path.with_suffix(".coefficients.png"))
        if len(releases) > 1:
            history_plot(releases, path.with_suffix(".history.png"))


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
        f"{decision['outcome'].replace('_', ' ')}: {decision['reason']}",
        f"vector {report['vector']['name']}, model {model['architecture']} ({model['kind']} fine-tune)",
    ]
    if held_out := report.get("held_out"):
        before, after = held_out["before"], held_out["after"]
        lines.append(
            f"held-out safety loss {before['safety']:.3f} → {after['safety']:.3f} nats, "
            f"task divergence {after['utility']:.4f} nats"
        )
    measured = report.get("measured", {"after": {}})
    for name in ("refusal_rate", "over_refusal", "incoherent"):
        if after := measured["after"].get(name):
            before = measured["before"][name]
            lines.append(
                f"{name.replace('_', ' ')} {before['share']:.0%} → {after['share']:.0%} "
                f"[{after['low']:.0%}, {after['high']:.0%}] of {after['count']} unseen prompts"
            )
    if loss := measured.get("utility_loss"):
        lines.append(
            f"task token accuracy lost {loss['share']:.1%} [{loss['low']:.1%}, {loss['high']:.1%}] "
            f"on {loss['count']} unseen samples"
        )
    return "\n".join(lines)


def scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """The report's main numbers under names for trackers. `safegene/outcome`: 2 accepted, 1 best effort, 0 rejected, −1 failed."""
    outcome = (report.get("decision") or {}).get("outcome", "failed")
    found = {"outcome": float(("failed", "rejected", "accepted_best_effort", "accepted").index(outcome) - 1)}
    for side in ("before", "after"):
        for name, share in report.get("measured", {}).get(side, {}).items():
            if name != "categories":
                found[f"{name}_{side}"] = share["share"]
        for name, loss in report.get("held_out", {}).get(side, {}).items():
            found[f"held_out_{name}_{side}"] = loss
    if "utility_loss" in report.get("measured", {}):
        found["utility_loss"] = report["measured"]["utility_loss"]["share"]
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
