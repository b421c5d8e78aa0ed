"""`safegene history FILE`: the releases of a model line, with a warning where refusals drift."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import SafeGeneError
from ..history import Release, drift_warnings, read_history
from ..reporting.plots import history_plot


def main(argv: Sequence[str]) -> int:
    """Prints one line per release; exit code 0, or 3 where refusals drift."""
    parser = argparse.ArgumentParser(prog="safegene history", description="Say how a model line's releases went.")
    parser.add_argument("file", type=Path, help="The file that `history` names in the `safegene` block.")
    parser.add_argument("--plot", type=Path, help="PNG file for the line.")
    arguments = parser.parse_args(list(argv))
    releases = read_history(arguments.file)
    if not releases:
        raise SafeGeneError(f"There is no history at {arguments.file}: set `history` in the `safegene` block.")
    print(describe(releases))
    warnings = drift_warnings(releases)
    for warning in warnings:
        print(f"warning: {warning}")
    if arguments.plot:
        history_plot(releases, arguments.plot)
    return 3 if warnings else 0


def describe(releases: Sequence[Release]) -> str:
    """A table of all releases: shares before → after the safety step."""
    rows = [("", "time", "outcome", "refuses harmful", "refuses benign", "incoherent", "utility lost", "output")]
    for number, release in enumerate(releases, start=1):
        shares = [_change(release, name) for name in ("refusal_rate", "over_refusal", "incoherent")]
        loss = release.get("utility_loss")
        lost = f"{loss['share']:+.1%}" if loss else ""
        rows.append((str(number), release["time"], release["outcome"], *shares, lost, release["output"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _change(release: Release, name: str) -> str:
    before, after = ((release.get(side) or {}).get(name) for side in ("before", "after"))
    return f"{before['share']:.0%} → {after['share']:.0%}" if before and after else ""
