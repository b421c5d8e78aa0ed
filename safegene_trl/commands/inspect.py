"""`safegene inspect DIR`: what a safety vector or a safeguarded checkpoint holds, after checking
it.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..checkpoints.contents import ADAPTER_CONFIG, FLEET_STATE, MARKER
from ..checkpoints.places import failure_path
from ..checkpoints.preflight import check_outputs
from ..config.validation import repository, written_path
from ..errors import SafeGeneError, VectorError
from ..evaluation.folder import RESULT
from ..models.names import by_component, layer_ranges
from ..provenance import sha256_of_bytes
from ..reporting.plots import selection_plot
from ..reporting.summary import summary
from ..text import one_line, printable, printable_values, read_json
from ..vectors.audit_file import AUDIT_FILE, audit_of
from ..vectors.files import CONFIG_FILE, WEIGHTS_FILE, read_files
from ..vectors.prompt_rows import Part, part_of, rows_of, verdict_of
from ..vectors.record import VectorRecord, extractions, read_record, refuses_as_another
from .output import give, json_file
from .plain_parser import PlainParser
from .vector_record import record_of


MOST_LINES = 100  # of coefficients; more of them are summed up
LARGEST = 5
_DAMAGED = "{report} is damaged or of another version: run the safety step again."
_TRAINERS_FOLDERS = ("safeguarded", "_safeguarded")  # in a trainer's `output_dir`


def main(argv: Sequence[str]) -> int:
    """Prints a summary; a vector that is damaged is an error, and so is a folder that is neither:
    the message says what it is.
    """
    parser = PlainParser(
        prog="safegene inspect", description="Say what a vector or checkpoint holds."
    )
    parser.add_argument(
        "directory",
        help="Safety vector (directory or hub id), safeguarded checkpoint, or the report of a safety step.",
    )
    parser.add_argument("--revision", help="Branch, tag or commit of a vector on the hub.")
    parser.add_argument(
        "--plot",
        type=written_path,
        help="PNG file for a vector's layer scores and their stability.",
    )
    arguments = parser.read(argv)
    place = Path(arguments.directory)
    if place.name in ("", ".."):  # the working directory has a name too
        place = Path(os.path.abspath(place))
    report = place if place.is_file() and place.suffix == ".json" else place / MARKER
    if report.is_file():
        if arguments.plot:
            raise SafeGeneError(
                f"`--plot` draws a vector's layer scores, and {report} is a report: leave it out."
            )
        found = _read_report(report)
        give(found, _describe_report(found, report))
        return 0
    _check_may_be_vector(place)
    contents = read_files(arguments.directory, revision=arguments.revision)
    vector = read_record(contents, arguments.directory)
    audit, told = _audited(contents, arguments.directory)
    record = record_of(vector, arguments.directory) | {"audit": audit}
    give(record, "\n".join([_describe_vector(vector), *told]))
    if arguments.plot:
        if not vector.selection.get("stability"):
            raise SafeGeneError(
                "This vector keeps no stability of its selection: make it again to plot it."
            )
        check_outputs([arguments.plot, json_file()])
        selection_plot(vector.selection, arguments.plot)
    return 0


def _audited(contents: Mapping[str, bytes], name: str) -> tuple[dict[str, Any] | None, list[str]]:
    """What the audit in the vector's folder comes to, as a record and as lines; nothing where there
    is none.
    """
    data = contents.get(AUDIT_FILE)
    if data is None:
        return None, []
    try:
        audit = audit_of(data, AUDIT_FILE)
        audit.check_of(sha256_of_bytes(contents[WEIGHTS_FILE]), name)
    except VectorError as error:
        return {"error": one_line(error)}, [
            printable(f"the audit beside it does not count: {error}")
        ]
    unsure = sum(cell.verdict == "unsure" for cell in audit.cells)
    record = {"cells": len(audit.cells), "blind_spots": len(audit.blind_spots), "unsure": unsure}
    return record, [
        f"audited in {len(audit.cells)} cells: blind spots {len(audit.blind_spots)}, unsure {unsure} ({AUDIT_FILE})"
    ]


def _read_report(report: Path) -> Any:
    try:
        return read_json(report.read_text(encoding="utf-8"))
    except OSError as error:
        raise SafeGeneError(f"{report} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise SafeGeneError(_DAMAGED.format(report=report)) from error


def _describe_report(found: Any, report: Path) -> str:
    """A report's outcome and coefficients."""
    try:
        found = printable_values(found)
        failed = found.get("status") == "failed"
        if failed and (found.get("decision") or {}).get("outcome") != "rejected":
            return f"failed: {found['error']['message']}"
        coefficients = (found.get("coefficients") or {}) if failed else found["coefficients"]
        return "\n".join([summary(found), *_describe_coefficients(coefficients, report)])
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise SafeGeneError(_DAMAGED.format(report=report)) from error


def _describe_coefficients(coefficients: Mapping[str, float], report: Path) -> list[str]:
    """A line for each, or where there are many what they come to."""
    parts = by_component(coefficients)
    shown = {
        f"{place}/{component}" if component else place: value
        for component, values in parts.items()
        for place, value in values.items()
    }
    width = max(map(len, shown), default=0)
    lines = [f"  {name:<{width}}  λ = {value:.3f}" for name, value in shown.items()]
    if len(lines) <= MOST_LINES:
        return lines
    found = []
    for component, values in parts.items():
        own = sorted(values.values())
        of = f" of component {component}" if component else ""
        found.append(
            f"  {len(own)} λ{of}: least {own[0]:.3f}, median {median(own):.3f}, largest {own[-1]:.3f}"
        )
    ranked = sorted(zip(shown.values(), lines, strict=True), key=lambda pair: -abs(pair[0]))
    return [
        *found,
        f"the {LARGEST} strongest ({report} has all):",
        *(line for _, line in ranked[:LARGEST]),
    ]


def _check_may_be_vector(place: Path) -> None:
    """Raises `SafeGeneError`, with what it is and which command it is for, for what lies here and
    is no vector.
    """
    if (place / CONFIG_FILE).is_file():
        return
    if place.is_file():
        raise SafeGeneError(
            f"{place} is a file: name a folder, or give a history to `safegene history`."
        )
    for target in (place, *(place / name for name in _TRAINERS_FOLDERS)):
        if (target / MARKER).is_file():
            raise SafeGeneError(
                f"{place} is a plain fine-tune: its safeguarded checkpoint is {target}, inspect that."
            )
        if target.name and failure_path(target).is_file():
            what = (
                f"{place} is a plain fine-tune"
                if place.is_dir()
                else f"There is no checkpoint at {place}"
            )
            raise SafeGeneError(
                f"{what}, because its safety step was rejected or failed: inspect {failure_path(target)}, which says why."
            )
    if place.is_dir():
        raise SafeGeneError(_other_folder(place))
    if len(place.parts) == 1:  # no vector on the hub is without an owner
        raise SafeGeneError(
            f"{place} is no folder or file: name a safety vector or a safeguarded checkpoint, or `owner/name` for a vector on the hub."
        )
    try:
        repository(str(place))
    except ValueError as error:
        raise SafeGeneError(
            f"{place} is not there: name a safety vector or a safeguarded checkpoint."
        ) from error


def _other_folder(folder: Path) -> str:
    if (folder / RESULT).is_file():
        return f"{folder} holds an evaluation: read {folder / RESULT}, or run `safegene evaluate` again to print it."
    if (folder / FLEET_STATE).is_file():
        return f"{folder} is a fleet's: inspect the folder of one of its models."
    for name, kind in ((ADAPTER_CONFIG, "an adapter"), ("config.json", "a checkpoint")):
        if (folder / name).is_file():
            return (
                f"{folder} is {kind} without the safety step: `safegene apply` safeguards it, and `safegene evaluate` "
                "measures it."
            )
    return (
        f"{folder} holds neither a safety vector nor a safeguarded checkpoint: name the folder that `safegene extract`, "
        "`sft` or `apply` wrote."
    )


def _tests(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line about the prompts to measure on, where there are any."""
    if not rows:
        return []
    told = []
    for kind in ("harmful", "benign"):
        own = [verdict_of(row) for row in rows if row["kind"] == kind]
        told.append(f"{len(own)} {kind} ones, {own.count('refused')} of them refused")
    return [f"prompts to measure on, by what the aligned model does: {'; '.join(told)}"]


def _lacking(soft: int, parts: Mapping[Part, int]) -> list[str]:
    """A line about what vectors of today have and this one lacks, where it lacks any."""
    found = {"soft targets": soft, "prompts to measure on": parts["measure"]}
    lacks = [what for what, count in found.items() if not count]
    if not lacks:
        return []
    return [
        f"without {' and '.join(lacks)}: `safegene extract` with `--vector` adds them, and keeps the weights"
    ]


def _components(vector: VectorRecord) -> list[str]:
    """Lines about the components of a vector of several, and about those of categories."""
    if len(vector.components) < 2:
        return []
    ranks = " + ".join(map(str, vector.components))
    lines = [f"{len(vector.components)} components with coefficients of their own, of rank {ranks}"]
    names = vector.extraction.get("component_names")
    record = vector.extraction.get("by_category")
    if names and record is None:
        lines.append(f"components: {', '.join(names)}")
    for category, own in record["categories"].items() if record else ():
        lines.append(
            f"  {own['component']}: category {category}, {own['prompts']} prompts, reads {own['reads_own']:.2f} of its own prompts, "
            f"{own['reads_others']:.2f} of other categories', {own['reads_benign']:.2f} of benign ones"
        )
    return lines


def _transported(extraction: Mapping[str, Any]) -> list[str]:
    """Lines about where directions were carried over from, where they were."""
    lines = []
    for made in extractions(extraction):
        if record := made.get("transport"):
            cosines = [layer["cosine"] for layer in record["layers"]]
            separation = [own["auc"] for own in record["detectors"].values()]
            lines.append(
                f"carried over from {record['source']['model']['name']} by {record['transport_map']}: cosine on texts held out "
                f"{min(cosines):.2f} to {max(cosines):.2f} by layer, detectors' AUC {min(separation):.2f} to {max(separation):.2f}"
            )
    if refuses_as_another(extraction):
        lines.append("the refusals are those of the model it was carried over from")
    return lines


def _describe_vector(vector: VectorRecord) -> str:
    parts = Counter(map(part_of, vector.prompts))
    soft = sum("targets" in row for row in vector.prompts)
    scores = vector.selection.get("scores", [])
    lines = [
        f"safety vector for {vector.family.architecture}, aligned model {vector.aligned_model['name']}",
        f"rank {vector.rank}, {len(vector.modules)} modules in layers {layer_ranges(vector.layers)}",
        f"extracted by {vector.extraction['method']}, selected by {vector.selection['method']}",
        f"{parts['harmful']} harmful prompts with refusals, {parts['benign']} benign prompts with answers"
        + (f", {parts['border']} with refusals" if parts["border"] else "")
        + (f", {soft} of them with soft targets" if soft else ""),
        *_transported(vector.extraction),
        *_tests(rows_of(vector.prompts, "measure")),
        *_lacking(soft, parts),
    ]
    lines[2:2] = _components(vector)
    if stability := vector.selection.get("stability"):
        lines.append(
            f"selection over resampled prompts: mean Jaccard index {stability['mean_jaccard']:.2f}"
        )
    for layer, score in enumerate(scores):
        lines.append(
            f"  layer {layer:>3}  score {score:+.4f}{'  selected' if layer in vector.layers else ''}"
        )
    return "\n".join(map(printable, lines))
