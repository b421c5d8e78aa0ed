"""`safegene history FILE`: the releases of a model line, with a warning where refusals drift."""

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.atomic_writes import replace_file
from ..checkpoints.preflight import check_outputs
from ..config.validation import written_path
from ..errors import SafeGeneError
from ..reporting.cells import headings, measured_cells
from ..reporting.outcome import minute_of, unmeasured
from ..reporting.plots import history_plot
from ..reporting.prometheus import exposition
from ..step.drift import drift_warnings
from ..step.history import Release, history_warnings, read_history, seal_history
from ..step.history_file import seal_path
from .output import give, json_file
from .plain_parser import PlainParser
from .tables import aligned


def main(argv: Sequence[str]) -> int:
    """Prints one line per release; exit code 0, or 3 where refusals drift."""
    parser = PlainParser(
        prog="safegene history", description="Say how a model line's releases went."
    )
    parser.add_argument(
        "file", type=Path, help="The file that `output.history` names in the `safegene` block."
    )
    parser.add_argument("--plot", type=written_path, help="PNG file for the line.")
    parser.add_argument("--html", type=written_path, help="HTML file of the line, for people.")
    parser.add_argument(
        "--prometheus",
        type=written_path,
        help="Text file of the newest release's numbers, for Prometheus' node exporter.",
    )
    parser.add_argument(
        "--seal",
        action="store_true",
        help="Seal the file as it is, after you have looked it through: where its seal is lost.",
    )
    arguments = parser.read(argv)
    if not arguments.file.is_file():
        raise SafeGeneError(
            f"There is no file {arguments.file}: name the one that `output.history` in the `safegene` block names."
        )
    _check_holds_releases(arguments.file)
    outputs = (arguments.plot, arguments.html, arguments.prometheus, json_file())
    check_outputs(outputs, [arguments.file, seal_path(arguments.file)])
    if arguments.seal:
        seal_history(arguments.file)
    releases = read_history(arguments.file)
    if not releases:
        raise SafeGeneError(f"The history {arguments.file} holds no releases yet.")
    drifts = drift_warnings(releases)
    warnings = [*history_warnings(arguments.file), *drifts]
    told = [describe(releases), *(f"warning: {warning}" for warning in warnings)]
    record = {"releases": releases, "warnings": warnings, "refusals_drift": bool(drifts)}
    give(record, "\n".join(told), warnings)
    if arguments.plot:
        history_plot(releases, arguments.plot)
    if arguments.html:
        from ..reporting.html import render_history  # jinja takes as long as all else

        replace_file(arguments.html, render_history(releases, warnings))
    if arguments.prometheus:
        replace_file(arguments.prometheus, exposition(releases, len(drifts)))
    return 3 if drifts else 0


def _check_holds_releases(path: Path) -> None:
    """Raises `SafeGeneError` for a file of which no line could be a release's: a damaged history
    still has some of their keys.
    """
    if seal_path(path).exists():
        return
    try:
        lines = path.read_bytes().splitlines()
    except OSError:  # whoever reads it says so
        return
    if lines and not any(word in line for line in lines for word in (b'"outcome"', b'"previous"')):
        raise SafeGeneError(
            f"{path} is no history of releases: name the file that `output.history` in the `safegene` block names."
        )


def describe(releases: Sequence[Release]) -> str:
    """A table of all releases: shares before → after the safety step."""
    rows = [["", "time (UTC)", "outcome", *headings(), "output"]]
    for number, release in enumerate(releases, start=1):
        rung = release.get("repair", "vector")
        outcome = release["outcome"] + (f" ({rung})" if rung != "vector" else "")
        outcome += unmeasured(release["outcome"], release)
        rows.append(
            [str(number), minute_of(release), outcome, *measured_cells(release), release["output"]]
        )
    return aligned(rows)
