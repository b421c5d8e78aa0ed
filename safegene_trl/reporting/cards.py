"""Model cards, through `huggingface_hub`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


if TYPE_CHECKING:
    from ..vector import SafetyVector


def vector_card(vector: "SafetyVector") -> ModelCard:
    """Card of a safety vector: what it is, what it was made from, how it must not be used."""
    data = ModelCardData(
        base_model=vector.aligned_model["name"],
        base_model_relation="adapter",
        library_name="peft",
        tags=["safegene-trl", "safety-vector", "lora"],
    )
    harmful = sum(row["kind"] == "harmful" for row in vector.prompts)
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# Safety vector for {vector.aligned_model["name"]}

Low-rank weight deltas (rank {vector.rank}) in layers {vector.layer_ranges} of `{vector.family.architecture}`,
pointing from a mildly degraded model to the aligned one. A fine-tune of the same family takes them on with learned
coefficients, one per module:

```python
from safegene_trl import SafeGeneCallback, SafeGeneConfig

callback = SafeGeneCallback(SafeGeneConfig(vector="path/or/hub-id"))  # for SFTTrainer or Trainer
```

- Made by: `{vector.extraction["method"]}`; layers selected by `{vector.selection["method"]}`.
- Comes with {harmful} harmful prompts and the aligned model's own refusals. It holds no harmful answers. Answers to benign
  prompts are the aligned model's own too: they mark behaviour and are not meant as facts.
{_categories(vector)}- Files, hashes and scores: `safegene_config.json`.

## Limits

It restores refusals that a fine-tune of *this* family has weakened, as far as the prompts it was made from cover them. It
does not make a model safe against determined attacks. Subtracting it would remove refusals: coefficients are never
negative in `safegene-trl`, and it must not be used that way elsewhere.
"""
    )


def _categories(vector: "SafetyVector") -> str:
    """A line about the harm categories that it was made from, where they are known."""
    records = [record["selection"] for record in vector.extraction.get("vectors", [])] or [vector.selection]
    found: dict[str, list[int]] = {}
    for counts in (record.get("categories", {}) for record in records):
        for name, count in counts.items():
            asked, refused = found.setdefault(name, [0, 0])
            found[name] = [asked + count["asked"], refused + count["refused"]]
    if not found:
        return ""
    listed = ", ".join(f"{name} ({refused} of {asked})" for name, (asked, refused) in sorted(found.items()))
    return (
        f"- Harm categories of its prompts, with how many the aligned model refused: {listed}. It is weak in those that the aligned model "
        "refuses less, and in those that are not among them.\n"
    )


_METRICS = {  # key in `measured.after`: metric, the prompts it is over
    "refusal_rate": ("Refusal rate", "harmful"),
    "over_refusal": ("Over-refusal", "benign"),
    "incoherent": ("Incoherent answers", "harmful and benign"),
}


def checkpoint_card(report: Mapping[str, Any], name: str) -> ModelCard:
    """Card of a safeguarded checkpoint or adapter: what was done to it, how it measured, what that does not say.

    Args:
        report: Its report.
        name: The model's name.
    """
    measured, vector, base = report.get("measured", {}), report["vector"], report["base"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="calibration",
            dataset_name=f"{prompts} prompts that no coefficient was fitted on",
            metric_type=key,
            metric_name=metric,
            metric_value=round(measured["after"][key]["share"], 4),
        )
        for key, (metric, prompts) in _METRICS.items()
        if key in measured.get("after", {})
    ]
    adapter = report["config"]["output_format"] == "adapter"
    data = ModelCardData(
        base_model=base["name"],
        base_model_relation="adapter" if adapter else "merge",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["safegene-trl", "safeguarded"],
        model_name=name,
        eval_results=results or None,
    )
    decision = report["decision"]
    text = f"""---
{data.to_yaml()}
---

# {name}

A {"LoRA" if report["model"]["kind"] == "lora" else "full"} fine-tune of {base["name"] or "a model of its family"} that has taken on the safety vector
{vector["name"]} ({vector["aligned_model"]["name"]}), by [safegene-trl](https://arxiv.org/abs/2606.06519): low-rank weight deltas, with one learned
coefficient per {"rank-one part" if report["config"]["granularity"] == "rank" else report["config"]["granularity"]}, that give it refusals back which the fine-tune had weakened.

Outcome: **{decision["outcome"].replace("_", " ")}**. {decision["reason"]}
"""
    if results:
        rows = "\n".join(
            f"| {metric} ({prompts}) | {_with_interval(measured['before'][key])} | {_with_interval(measured['after'][key])} |"
            for key, (metric, prompts) in _METRICS.items()
            if key in measured["after"]
        )
        text += f"""
| | fine-tuned | safeguarded |
| --- | --- | --- |
{rows}

Shares with 95 % intervals, on prompts that no coefficient was fitted on; greedy answers, judge `{measured["judge"]}`. The whole record is in
`safegene_report.json`, for reading in `safegene_report.html`.
"""
    return ModelCard(
        text
        + """
## Limits

The judge counts refusals and does not see harm: this is no proof of safety. What a benign fine-tune had weakened is restored as far as the vector's prompts
cover it; somebody who trains for harm can take it away again. This checkpoint's `config.json` says which vector its weights hold, so that it is never added
twice.
"""
    )


def _with_interval(share: Mapping[str, float]) -> str:
    return f"{share['share']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"
