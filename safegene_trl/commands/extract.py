"""`safegene extract`: a safety vector from an aligned and a degraded model, or from another model's
direction.
"""

from collections.abc import Sequence

from ..distributed.processes import join_processes, leave_processes
from ..extraction.config import ExtractionConfig
from ..extraction.extract import extract
from ..models.names import layer_index
from ..vectors.prompt_rows import part_of
from ..vectors.safety_vector import SafetyVector
from .launch_option import wants_launch
from .launching import launch
from .output import give
from .parsing import make_parser, parse
from .vector_record import record_of


def main(argv: Sequence[str]) -> int:
    """Makes the vector and saves it to `output_dir`."""
    if wants_launch(argv):
        return launch("extract", argv, make_parser((ExtractionConfig,)))
    join_processes()
    (config,) = parse(
        (ExtractionConfig,), argv, prog="safegene extract", description="Make a safety vector."
    )
    vector = extract(config)
    if vector is not None:
        told = [_made_of(config, vector), *_covered(config, vector), *_tested(config, vector)]
        told.append(
            f"Safety vector (rank {vector.rank}, layers {vector.layer_ranges}): {config.output_dir}"
        )
        give(record_of(vector, config.output_dir), "\n".join(told))
    leave_processes()
    return 0


def _made_of(config: ExtractionConfig, vector: SafetyVector) -> str:
    """What the vector holds of the difference, how well a direction was carried over, or which of its
    prompts are new.
    """
    if config.transports:
        return "\n".join(_carried(vector))
    if not config.vector:
        share = vector.extraction["covered_share"]
        return f"The linear layers hold {100 * share:.3g} % of the difference of the two models."
    soft = sum("targets" in row for row in vector.prompts)
    parts = [part_of(row) for row in vector.prompts]
    kept = ", split by category" if config.by_category else ""
    return (
        f"The weights are those of {config.vector}{kept}. Of {len(parts)} prompts {soft} have soft targets, {parts.count('border')} are benign "
        f"ones that the aligned model refuses, and {parts.count('measure')} are to measure on."
    )


def _carried(vector: SafetyVector) -> list[str]:
    """A line for every layer of the target."""
    record = vector.extraction["transport"]
    lines = [
        f"Directions carried over by {record['transport_map']}, fitted on {record['anchors']['fitted']} anchors and measured on "
        f"{record['anchors']['held_out']} others:"
    ]
    for index, layer in enumerate(record["layers"]):
        aucs = [
            own["auc"] for name, own in record["detectors"].items() if layer_index(name) == index
        ]
        lines.append(
            f"  layer {index:>3} from {layer['source_layer']:>3}  R² {layer['explained']:+.2f}  cosine {layer['cosine']:+.2f}  "
            f"halves {layer['agreement']:+.2f}  own {layer['own_cosine']:+.2f}"
            + (f"  detectors' AUC {min(aucs):.2f}" if aucs else "")
        )
    refusals = record["refusals"]
    whose = "its own" if refusals["from"] == "target" else "the source's"
    lines.append(
        f"The target refuses {refusals['refused']} of {refusals['asked']} harmful prompts: the stored refusals are {whose}."
    )
    return lines


def _covered(config: ExtractionConfig, vector: SafetyVector) -> list[str]:
    """What became of the prompts for an audit's blind spots, where one is named."""
    if not config.cover:
        return []
    record = vector.selection
    if config.vector:
        record = vector.extraction["weights_from"]["prompts"]
    found = record["cover"]
    asked = sum(found["prompts"].values())
    return [
        f"Of {asked} prompts for {len(found['prompts'])} blind spots the aligned model refuses {found['refused']}, which the vector has now: "
        "recalibrate, and audit again with `--before`."
    ]


def _tested(config: ExtractionConfig, vector: SafetyVector) -> list[str]:
    """What became of the prompts to measure on that were given, a line for each kind."""
    if config.test_harmful_data is None and config.test_benign_data is None:
        return []
    lines = []
    for kind in ("harmful", "benign"):
        found = vector.selection["test_prompts"].get(kind, {})
        left_out = {
            "left out, because they nearly repeat others": found.get("repeated", 0),
            "left out for their answers": sum(
                found.get(label, 0) for label in ("incoherent", "unfinished", "unjudged")
            ),
        }
        said = [
            f"the aligned model refuses {found.get('refused', 0)} and answers {found.get('answered', 0)}",
            *(f"{count} {why}" for why, count in left_out.items() if count),
        ]
        lines.append(f"{kind.capitalize()} prompts to measure on: {'; '.join(said)}.")
    return lines
