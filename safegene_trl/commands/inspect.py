"""`safegene inspect DIR`: what a safety vector or a safeguarded checkpoint holds, after checking it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.output import MARKER
from ..config.validation import written_path
from ..errors import SafeGeneError
from ..models.coefficients import by_component
from ..reporting.plots import selection_plot
from ..reporting.report import summary
from ..text import printable, printable_values, read_json
from ..vectors.safety_vector import SafetyVector


def main(argv: Sequence[str]) -> int:
    """Prints a summary; a vector that is damaged is an error."""
    parser = argparse.ArgumentParser(prog="safegene inspect", description="Say what a vector or checkpoint holds.")
    parser.add_argument("directory", help="Safety vector (directory or hub id) or safeguarded checkpoint.")
    parser.add_argument("--revision", help="Branch, tag or commit of a vector on the hub.")
    parser.add_argument("--plot", type=written_path, help="PNG file for a vector's layer scores and their stability.")
    arguments = parser.parse_args(list(argv))
    report = Path(arguments.directory) / MARKER
    if report.is_file():
        try:
            found = printable_values(read_json(report.read_text(encoding="utf-8")))
            shown = {
                f"{place}/{component}" if component else place: value
                for component, values in by_component(found["coefficients"]).items()
                for place, value in values.items()
            }
            width = max(map(len, shown), default=0)
            coefficients = [f"  {name:<{width}}  λ = {value:.3f}" for name, value in shown.items()]
            described = "\n".join([summary(found), *coefficients])
        except OSError as error:
            raise SafeGeneError(f"{report} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise SafeGeneError(f"{report} is damaged or of another version: run the safety step again.") from error
        print(described)
    else:
        vector = SafetyVector.from_pretrained(arguments.directory, revision=arguments.revision)
        print(_describe_vector(vector))
        if arguments.plot:
            if "stability" not in vector.selection:
                raise SafeGeneError("This vector keeps no stability of its selection: make it again to plot it.")
            selection_plot(vector.selection, arguments.plot)
    return 0


def _describe_vector(vector: SafetyVector) -> str:
    kinds = [row["kind"] for row in vector.prompts]
    scores = vector.selection.get("scores", [])
    lines = [
        f"safety vector for {vector.family.architecture}, aligned model {vector.aligned_model['name']}",
        f"rank {vector.rank}, {len(vector.deltas)} modules in layers {vector.layer_ranges}",
        f"extracted by {vector.extraction['method']}, selected by {vector.selection['method']}",
        f"{kinds.count('harmful')} harmful prompts with refusals, {kinds.count('benign')} benign prompts with answers",
    ]
    if len(vector.components) > 1:
        lines.insert(
            2,
            f"{len(vector.components)} components with coefficients of their own, of rank {' + '.join(map(str, vector.components))}",
        )
    if stability := vector.selection.get("stability"):
        lines.append(f"selection over resampled prompts: mean Jaccard index {stability['mean_jaccard']:.2f}")
    for layer, score in enumerate(scores):
        lines.append(f"  layer {layer:>3}  score {score:+.4f}{'  selected' if layer in vector.layers else ''}")
    return "\n".join(map(printable, lines))
