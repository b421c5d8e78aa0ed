"""What a terminal shows of a report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.contents import MARKER
from ..config.metrics import METRICS
from ..text import printable, told_apart
from .outcome import verdict


def summary(report: Mapping[str, Any]) -> str:
    """The outcome in a few lines for a terminal: reason, vector, and what was measured before and
    after with 95 % intervals, and of the aligned model where that is known.
    """
    decision, model = report["decision"], report["model"]
    lines = [
        f"{verdict(report)}: {printable(decision['reason'])}",
        f"vector {printable(report['vector']['name'])}, model {printable(model['architecture'])} ({model['kind']} fine-tune)",
    ]
    if held_out := report.get("held_out"):
        before, after = held_out["before"], held_out["after"]
        was, now = told_apart(before["safety"], after["safety"])
        lines.append(
            f"held-out safety loss {was} → {now} nats, task divergence {after['utility']:.4f} nats"
        )
    if repair := report.get("repair"):
        lines.append(f"repair by {printable(repair['rung'])}: {printable(repair['reason'])}")
    if earlier := (report.get("base") or {}).get("touch_ups"):
        lines.append(f"the weights also hold {len(earlier)} touch-up(s) of earlier releases")
    measured = report.get("measured", {})
    for metric in METRICS.values():
        if (after := metric.measured(measured)) is None:
            continue
        interval = f"[{after['low']:.1%}, {after['high']:.1%}]"
        if (before := metric.measured(measured, "before")) is None:
            task = metric.items == "task"
            what = "samples" if task else f"{metric.items} prompts"
            lines.append(
                f"{'task ' if task else ''}{metric.title.lower()} {after['share']:.1%} {interval} on {after['count']} unseen {what}"
            )
        else:
            shares = f"{before['share']:.0%} → {after['share']:.0%} [{after['low']:.0%}, {after['high']:.0%}]"
            aligned = metric.measured(measured, "aligned")
            own = f", {aligned['share']:.0%} by the aligned model" if aligned else ""
            lines.append(f"{metric.words} {shares} of {after['count']} unseen prompts{own}")
    lines += _by_category(measured)
    return "\n".join(lines)


def _by_category(measured: Mapping[str, Any]) -> list[str]:
    """For every metric that was measured by category, a line about the worst of them."""
    lines = []
    for metric in METRICS.values():
        found = metric.by_category(measured)
        if len(found) < 2:
            continue
        worst = min if metric.better == "more" else max
        name = worst(found, key=lambda category: (found[category]["share"], category))
        share = found[name]
        lines.append(
            f"{metric.words} by category ({len(found)}): {'least' if worst is min else 'most'} in {printable(name)}, {share['share']:.0%} "
            f"[{share['low']:.0%}, {share['high']:.0%}] of {share['count']} prompts"
        )
    return lines


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
