"""The releases of one model line: an append-only file of JSON lines, each holding the hash of the line before it."""

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy.stats import fisher_exact, kendalltau

from .errors import SafeGeneError
from .output import writing
from .provenance import sha256_of_json, weight_hashes
from .vector_files import WEIGHTS_FILE


Release = dict[str, Any]
SIGNIFICANCE = 0.05
FEWEST_FOR_TREND = 5  # with fewer releases no order of them is unlikely enough by chance


def release_of(report: dict[str, Any], output: Path) -> Release:
    """What the history keeps of a report."""
    base = report["base"]
    weights = weight_hashes(base)
    measured = report.get("measured", {})
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "output": str(output),
        "outcome": report["decision"]["outcome"],
        "reason": report["decision"]["reason"],
        "vector": {
            "name": report["vector"]["name"],
            "sha256": report["vector"]["files"].get(WEIGHTS_FILE, {}).get("sha256"),
        },
        "base": {
            "name": base["name"],
            "revision": base["revision"],
            "sha256": sha256_of_json(weights) if weights else None,
            "carries_vector": base["carries_vector"],
        },
        "coefficients": report["coefficients"],
        "held_out": report.get("held_out"),
        "before": measured.get("before"),
        "after": measured.get("after"),
        "utility_loss": measured.get("utility_loss"),
        "report": sha256_of_json(report),
    }


def append_release(path: Path, release: Release) -> None:
    """Adds a release, chained to the one before. Runs of one line may end at the same time.

    Raises:
        OutputError: The file cannot be written.
    """
    with writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole, _, torn = file.read().rpartition(b"\n")
            if torn:  # a line that a crash cut off
                file.truncate(len(whole) + 1 if whole else 0)
            last = whole.split(b"\n")[-1]
            line = {**release, "previous": hashlib.sha256(last).hexdigest() if last else None}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_history(path: Path) -> list[Release]:
    """All releases, the oldest first; none where there is no file. A last line that a crash cut off is not one.

    Raises:
        SafeGeneError: It cannot be read, or a line was changed or taken out.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise SafeGeneError(f"The history {path} cannot be read: {error.strerror}.") from error
    releases: list[Release] = []
    previous = None
    for number, line in enumerate(lines, start=1):
        try:
            release = json.loads(line)
            chained = release["previous"] == previous
        except (ValueError, KeyError, TypeError) as error:
            raise SafeGeneError(f"Line {number} of the history {path} is damaged: restore the file.") from error
        if not chained:
            raise SafeGeneError(
                f"Line {number} of the history {path} does not follow from the line before: one was changed or taken out; restore the file."
            )
        releases.append(release)
        previous = hashlib.sha256(line).hexdigest()
    return releases


def last_accepted(releases: Sequence[Release]) -> Release | None:
    """The newest release that was not rejected."""
    return next((release for release in reversed(releases) if release["outcome"] != "rejected"), None)


def base_warnings(releases: Sequence[Release], base: dict[str, Any]) -> list[str]:
    """Whether a fine-tune started from another base than the last release, as it is in a report; a re-based one is none."""
    weights = weight_hashes(base)
    if not weights or base["carries_vector"]:
        return []
    bases = [r["base"] for r in releases if r["outcome"] != "rejected" and not r["base"]["carries_vector"]]
    if not bases or bases[-1]["sha256"] in (None, sha256_of_json(weights)):
        return []
    return [
        f"The base model is not that of the last release: {_named(base)} instead of {_named(bases[-1])}. Coefficients and numbers "
        "may not compare."
    ]


def _named(base: dict[str, Any]) -> str:
    return str(base["name"]) + (f" at {base['revision']}" if base["revision"] else "")


def drift_warnings(releases: Sequence[Release]) -> list[str]:
    """Whether refusals get fewer from release to release, beyond chance (one-sided, p < 0.05).

    The newest accepted release is held against all before it together (Fisher's exact test), and the order of all of them against
    their refusal rates (Kendall's τ).
    """
    rates = [
        release["after"]["refusal_rate"]
        for release in releases
        if release["outcome"] != "rejected" and (release.get("after") or {}).get("refusal_rate")
    ]
    if len(rates) < 2:
        return []
    *earlier, newest = rates
    refused, count = (sum(rate[key] for rate in earlier) for key in ("successes", "count"))
    table = [[newest["successes"], newest["count"] - newest["successes"]], [refused, count - refused]]
    warnings = []
    if fisher_exact(table, alternative="less").pvalue < SIGNIFICANCE:
        warnings.append(
            f"The newest release refuses {newest['share']:.0%} of {newest['count']} harmful prompts, those before it {refused / count:.0%}."
        )
    if len(rates) >= FEWEST_FOR_TREND:
        trend = kendalltau(range(len(rates)), [rate["share"] for rate in rates], alternative="less")
        if trend.pvalue < SIGNIFICANCE:
            shares = ", ".join(f"{rate['share']:.0%}" for rate in rates)
            warnings.append(f"Refusals get fewer from release to release: {shares}.")
    return warnings
