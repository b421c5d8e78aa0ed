"""The model card of a checkpoint. All that comes from files and settings is inert in it: names,
reasons.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.metrics import Metric, differences, shares
from ..text import code, markdown, one_line
from .outcome import measures_refusals, verdict


LIMITS = """
## Limits

The judge counts refusals and does not see harm: this is no proof of safety. What a benign fine-tune had weakened is restored as far as the vector's prompts
cover it; somebody who trains for harm can take it away again. This checkpoint's `config.json` says which vector its weights hold, so that it is never added
twice.
"""
_Row = tuple[Metric, Mapping[str, float], Mapping[str, float]]  # before and after


def checkpoint_card(report: Mapping[str, Any], name: str) -> ModelCard:
    """Card of a safeguarded checkpoint or adapter: what was done to it, how it measured, what that
    does not say.

    Args:
        report: Its report.
        name: The model's name.
    """
    shown = _shown(report.get("measured", {}))
    text = f"""---
{_front_matter(report, name, shown).to_yaml()}
---

# {markdown(name)}

{_what_was_done(report)}
"""
    if shown:
        text += _table(shown, report["measured"]["judge"])
        text += _by_category(report["measured"])
        text += _against_aligned(report["measured"])
    return ModelCard(text + LIMITS)


def _shown(measured: Mapping[str, Any]) -> list[_Row]:
    """The shares that were measured both before and after."""
    pairs = [
        (metric, metric.measured(measured, "before"), metric.measured(measured))
        for metric in shares()
    ]
    return [
        (metric, before, after)
        for metric, before, after in pairs
        if before is not None and after is not None
    ]


def _front_matter(report: Mapping[str, Any], name: str, shown: Sequence[_Row]) -> ModelCardData:
    """What the hub reads of the card."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="calibration",
            dataset_name=f"{metric.items} prompts that no coefficient was fitted on",
            metric_type=metric.key,
            metric_name=metric.title,
            metric_value=round(after["share"], 4),
        )
        for metric, _, after in shown
    ]
    adapter = report["config"]["output"]["output_format"] == "adapter"
    return ModelCardData(
        base_model=hub_id(report["base"]["name"]),
        base_model_relation="adapter" if adapter else "merge",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["safegene-trl", "safeguarded"],
        model_name=one_line(name),
        eval_results=results or None,
    )


def _what_was_done(report: Mapping[str, Any]) -> str:
    vector, base, decision = report["vector"], report["base"], report["decision"]
    granularity = report["config"]["search"]["granularity"]
    purpose = "that give" if measures_refusals(report.get("measured", {})) else "meant to give"
    return f"""A {"LoRA" if report["model"]["kind"] == "lora" else "full"} fine-tune of {markdown(base["name"] or "a model of its family")} that has taken on the safety vector
named {markdown(vector["name"])} ({markdown(vector["aligned_model"]["name"])}), by [safegene-trl](https://arxiv.org/abs/2606.06519): low-rank weight deltas, with one learned
coefficient per {"rank-one part" if granularity == "rank" else markdown(granularity)}, {purpose} it refusals back which the fine-tune had weakened.

Outcome: **{markdown(verdict(report))}**. {markdown(decision["reason"])}{_touched_up(report)}{_on_what(report)}"""


def _touched_up(report: Mapping[str, Any]) -> str:
    """What else its weights hold: a touch-up of this release, and of earlier ones."""
    repair, earlier = report.get("repair", {}), report["base"].get("touch_ups", [])
    said = []
    if repair.get("rung", "vector") != "vector":
        learned = repair["touch_up"]
        said.append(
            f"Beside the vector its weights hold a low-rank touch-up of rank {learned['rank']}, learned from the same few samples "
            f"(`safegene_touch_up.safetensors`, SHA-256 {code(learned['sha256'])})."
        )
    if earlier:
        said.append(f"They hold what was learned so for earlier releases, too ({len(earlier)}).")
    return f"\n\n{' '.join(said)}" if said else ""


def _on_what(report: Mapping[str, Any]) -> str:
    """What was measured and what was written, where a quantised base makes them two things."""
    base = (report.get("shipped") or {}).get("base")
    if base is None:
        return ""
    return f"""

Coefficients were found on: {markdown(base["recalibrated_on"])}. Measured: {markdown(base["measured_on"])}. Written: {markdown(base["written"])}."""


def _table(shown: Sequence[_Row], judge: str) -> str:
    rows = "\n".join(
        f"| {metric.title} | {_with_interval(before)} | {_with_interval(after)} |"
        for metric, before, after in shown
    )
    return f"""
| | fine-tuned | safeguarded |
| --- | --- | --- |
{rows}

Shares with 95 % intervals, on prompts that no coefficient was fitted on; greedy answers, judge {code(judge)}. The whole record is in
`safegene_report.json`, for reading in `safegene_report.html`.
"""


def _by_category(measured: Mapping[str, Any]) -> str:
    """A table for every metric that was measured by category; empty where none was."""
    tables = ""
    for metric in shares():
        before, after = (metric.by_category(measured, side) for side in ("before", "after"))
        rows = "\n".join(
            f"| {markdown(name)} | {_with_interval(before[name])} | {_with_interval(share)} | {share['count']} |"
            for name, share in after.items()
            if name in before
        )
        if rows:
            tables += f"\n| {metric.title}, by category | fine-tuned | safeguarded | prompts |\n| --- | --- | --- | --- |\n{rows}\n"
    return tables


def _against_aligned(measured: Mapping[str, Any]) -> str:
    """A paragraph about what is held against the aligned model; empty where nothing is."""
    aligned = measured.get("aligned", {})
    told = [
        f"{metric.title.lower()} by the aligned model itself {_with_interval(share)}"
        for metric in shares()
        if (share := aligned.get(metric.key))
    ]
    told += [
        f"{metric.title[0].lower()}{metric.title[1:]} {_with_interval(share)}"
        for metric in differences()
        if metric.relative and (share := metric.measured(measured))
    ]
    return f"\nOn the same prompts: {'; '.join(told)}.\n" if told else ""


def hub_id(name: str | None) -> str | None:
    """A name that the hub takes for a model, else None: a card with another one cannot be uploaded."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name


def _with_interval(share: Mapping[str, float]) -> str:
    return f"{share['share']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"
