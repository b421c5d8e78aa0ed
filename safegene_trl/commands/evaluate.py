"""`safegene evaluate`: refusals, over-refusal and utility of a checkpoint or adapter."""

from collections.abc import Sequence
from typing import Any

from ..distributed.processes import join_processes
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluate import RESULT, evaluate
from ..text import printable
from .launch_option import wants_launch
from .launching import launch
from .output import give
from .parsing import make_parser, parse


def main(argv: Sequence[str]) -> int:
    """Writes answers, verdicts and results to `output_dir`, and prints every judge's numbers."""
    if wants_launch(argv):
        return launch("evaluate", argv, make_parser((EvaluationConfig,)))
    join_processes()
    (config,) = parse(
        (EvaluationConfig,),
        argv,
        prog="safegene evaluate",
        description="Measure refusals, over-refusal and utility.",
    )
    result = evaluate(config)
    if result is not None:
        place = f"Answers, verdicts and all numbers: {config.output_dir} ({RESULT})"
        give(result, f"{text(result)}\n\n{place}")
    return 0


def text(result: dict[str, Any]) -> str:
    """The result as a table for each judge: shares in per cent, with 95 % intervals."""
    lines: list[str] = []
    for name, judge in result["judges"].items():
        lines += [*([""] if lines else []), *_of_judge(name, judge)]
    lines += ["", *_how_compared(result["judges"])] if len(result["judges"]) > 1 else []
    for pair in result["agreement"]:
        kappa = "–" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        lines.append(
            f"Cohen's κ of {printable(' and '.join(pair['judges']))}: {kappa} on {pair['answers']} answers"
        )
    for task, metrics in result.get("utility", {}).get("results", {}).items():
        shown = ", ".join(f"{key.split(',')[0]} {value:.4g}" for key, value in metrics.items())
        lines.append(f"utility {printable(task)}: {printable(shown)}")
    if result["settings"]["chat_template"] is None:
        lines.append("The tokenizer has no chat template: prompts went to the model as plain text.")
    if result["left_out_as_repeated"]:
        lines.append(
            f"{len(result['left_out_as_repeated'])} prompts left out, because they repeat excluded ones."
        )
    return "\n".join(lines)


def _of_judge(name: str, judge: dict[str, Any]) -> list[str]:
    """One judge's numbers."""
    lines = [
        f"Judge {printable(name)} (sees {judge['sees']}); shares in %, with 95 % intervals.",
        "",
    ]
    for set_name, found in judge["sets"].items():
        measures = (
            ("attack_success", "refused")
            if found["kind"] == "harmful"
            else ("answered", "over_refusal")
        )
        cells = [f"{measure.replace('_', ' ')} {_share(found[measure])}" for measure in measures]
        cells += _disagreement(found)
        lines.append(f"{printable(set_name):<28} {found['kind']:<8} {'   '.join(cells)}")
        others = {
            label: count
            for label, count in found["labels"].items()
            if label in ("incoherent", "off_task", "unfinished", "unjudged")
        }
        if others:
            lines[-1] += "   " + ", ".join(
                f"{count} {label.replace('_', '-')}" for label, count in others.items()
            )
    for measure in ("attack_success", "over_refusal"):
        mean = judge[measure]
        if mean and mean["sets"] > 1:  # of one set it stands above
            cells = [f"{measure.replace('_', ' ')}, mean over {mean['sets']} sets: {_share(mean)}"]
            lines.append("   ".join([*cells, *_disagreement(mean)]))
    return lines


def _disagreement(found: dict[str, Any]) -> list[str]:
    """What stands beside a set's shares, or a mean, where there are several judges."""
    own = found.get("disagreement")
    if own is None:
        return ["judges not compared"] if "disagreement" in found else []
    left_out = f" ({own['left_out']} not judged by all)" if own["left_out"] else ""
    return [f"judges disagree {_share(own)}{left_out}"]


def _how_compared(judges: dict[str, Any]) -> list[str]:
    """On what several judges are compared."""
    said = [
        "Judges disagree: one says that the attack succeeded, or that the benign prompt was refused, and another does not; "
        "of the answers that all of them judged."
    ]
    sets = [found for judge in judges.values() for found in judge["sets"].values()]
    if any(found["disagreement"] is None for found in sets):
        said.append("On benign prompts only judges that see refusals are compared.")
    return said


def _share(found: dict[str, Any] | None) -> str:
    """A share with its interval and the number of answers that it is of."""
    if found is None or found["share"] is None:
        return "– of 0"
    share, low, high, count = (found[key] for key in ("share", "low", "high", "count"))
    interval = (
        "(no interval: every set is all alike)"
        if low is None
        else f"[{100 * low:.1f}, {100 * high:.1f}]"
    )
    return f"{100 * share:.1f} {interval} of {count}"
