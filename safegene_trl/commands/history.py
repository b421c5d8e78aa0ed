"""`safegene history FILE`: the releases of a model line, with a warning where refusals drift."""

from collections.abc import Sequence
from pathlib import Path

from ..config.validation import written_path
from ..errors import SafeGeneError
from ..reporting.plots import history_plot
from ..step.drift import drift_warnings
from ..step.history import Release, history_warnings, read_history, seal_history
from ..step.history_file import seal_path
from .plain_parser import PlainParser
from .tables import aligned, headings, measured_cells


def main(argv: Sequence[str]) -> int:
    """Prints one line per release; exit code 0, or 3 where refusals drift."""
    parser = PlainParser(
        prog="safegene history", description="Say how a model line's releases went."
    )
    parser.add_argument(
        "file", type=Path, help="The file that `output.history` names in the `safegene` block."
    )
    parser.add_argument("--plot", type=written_path, help="PNG file for the line.")
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
    if arguments.seal:
        seal_history(arguments.file)
    releases = read_history(arguments.file)
    if not releases:
        raise SafeGeneError(f"The history {arguments.file} holds no releases yet.")
    print(describe(releases))
    for warning in history_warnings(arguments.file):
        print(f"warning: {warning}")
    warnings = drift_warnings(releases)
    for warning in warnings:
        print(f"warning: {warning}")
    if arguments.plot:
        history_plot(releases, arguments.plot)
    return 3 if warnings else 0


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
        time = release["time"][:16].replace("T", " ")
        rows.append(
            [str(number), time, release["outcome"], *measured_cells(release), release["output"]]
        )
    return aligned(rows)
