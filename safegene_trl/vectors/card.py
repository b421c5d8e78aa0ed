"""The model card of a safety vector. All that comes from its files is inert in it: names,
categories.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData

from ..errors import VectorError
from ..models.low_rank import LowRankDelta
from ..reporting.cards import hub_id
from ..text import code, markdown
from .audit_file import AUDIT_FILE, AuditRecord, audit_of
from .components import category_cosines, component_cosines
from .family import Family
from .prompt_rows import rows_of
from .record import extractions, refuses_as_another


logger = logging.getLogger(__name__)
_WEIGHTS = "adapter_model.safetensors"
_MOST_SPOTS = 20  # that a card names


class Described(Protocol):
    """What the card tells of a safety vector."""

    aligned_model: dict[str, Any]
    family: Family
    extraction: dict[str, Any]
    selection: dict[str, Any]
    files: dict[str, dict[str, Any]]
    audit: bytes | None

    @property
    def prompts(self) -> Sequence[dict[str, Any]]: ...

    @property
    def rank(self) -> int: ...

    @property
    def layer_ranges(self) -> str: ...

    @property
    def components(self) -> list[int]: ...

    @property
    def component_names(self) -> list[str]: ...

    @property
    def deltas(self) -> Mapping[str, LowRankDelta]: ...


def vector_card(vector: Described) -> ModelCard:
    """Card of a safety vector: what it is, what it was made from, how it must not be used."""
    data = ModelCardData(
        base_model=hub_id(vector.aligned_model["name"]),
        base_model_relation="adapter",
        library_name="peft",
        tags=["safegene-trl", "safety-vector", "lora"],
    )
    harmful = len(rows_of(vector.prompts, "harmful"))
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# Safety vector for {markdown(vector.aligned_model["name"])}

Low-rank weight deltas (rank {vector.rank}) in layers {vector.layer_ranges} of {code(vector.family.architecture)},
{_pointing(vector)}. A fine-tune of the same family takes them on with learned
coefficients, one per module:

```python
from safegene_trl import SafeGeneCallback, SafeGeneConfig

callback = SafeGeneCallback(SafeGeneConfig(vector="path/or/hub-id"))  # for SFTTrainer or Trainer
```

- Made by: {code(vector.extraction["method"])}; layers selected by {code(vector.selection["method"])}.
- Comes with {harmful} harmful prompts and {_whose(vector)} refusals. It holds no harmful answers. Answers to benign
  prompts are the aligned model's own too: they mark behaviour and are not meant as facts.
{_further(vector)}{_categories(vector)}{_transport(vector)}- Files, hashes and scores: `safegene_config.json`.
{_components(vector)}{_audited(vector)}
## Limits

It restores refusals that a fine-tune of *this* family has weakened, as far as the prompts it was made from cover them. It
does not make a model safe against determined attacks. Subtracting it would remove refusals: coefficients are never
negative in `safegene-trl`, and it must not be used that way elsewhere.
"""
    )


def _pointing(vector: Described) -> str:
    if not any("transport" in made for made in extractions(vector.extraction)):
        return "pointing from a mildly degraded model to the aligned one"
    return (
        "writing a direction that was carried over from another model (no degraded model was made)"
    )


def _whose(vector: Described) -> str:
    other = refuses_as_another(vector.extraction)
    return "another model's" if other else "the aligned model's own"


def _transport(vector: Described) -> str:
    """Lines about where a direction was carried over from, and how well that went."""
    lines = ""
    for made in extractions(vector.extraction):
        if (record := made.get("transport")) is None:
            continue
        cosines = [layer["cosine"] for layer in record["layers"]]
        separation = [own["auc"] for own in record["detectors"].values()]
        lines += (
            f"- Carried over from {markdown(record['source']['model']['name'])} by {code(record['transport_map'])} on benign texts: on texts "
            f"held out, mapped and true states have a cosine of {min(cosines):.2f} to {max(cosines):.2f} by layer; its modules tell harmful from "
            f"benign prompts with an AUC of {min(separation):.2f} to {max(separation):.2f}.\n"
        )
    return lines


def _further(vector: Described) -> str:
    """Lines about benign prompts that the aligned model refuses and about those to measure on,
    where there are any.
    """
    border, tests = rows_of(vector.prompts, "border"), rows_of(vector.prompts, "measure")
    lines = ""
    if border:
        lines += f"- Comes with {len(border)} benign prompts that the aligned model refuses, and its refusals.\n"
    if tests:
        lines += (
            f"- Comes with {len(tests)} prompts to measure on, each with whether the aligned model refuses it and without an "
            "answer.\n"
        )
    return lines


def _components(vector: Described) -> str:
    """A section about the components of a vector of several: those of categories, and the cosines."""
    if len(vector.components) < 2:
        return ""
    names = [markdown(name) for name in vector.component_names]
    record = vector.extraction.get("by_category")
    by = ""
    if record is not None:
        rows = "\n".join(
            f"| {markdown(category)} | {code(own['component'])} | {own['prompts']} | {own['reads_own']:.2f} | "
            f"{own['reads_others']:.2f} | {own['reads_benign']:.2f} |"
            for category, own in record["categories"].items()
        )
        by = (
            "\nWhat each category's component reads of its own prompts (mean), of other categories' and of benign ones (roots of mean "
            "squares), of prompts that its reading was not fitted on; 1, 0 and 0 is best:\n\n"
            f"| category | component | prompts | own | others | benign |\n| --- | --- | --- | --- | --- | --- |\n{rows}\n"
        )
    cosines = _table(component_cosines(vector.deltas, vector.components)["overall"], names)
    if record is not None:
        written = category_cosines(vector.deltas, len(names) - 1)
        cosines += f"\nCosines between what they do to their categories beyond what all do:\n\n{_table(written, names[1:])}"
    return f"""
## Components

{len(names)} components have coefficients of their own; with all at 1 they are the whole vector.
{by}
Cosines between their weights:

{cosines}"""


def _table(table: Sequence[Sequence[float | None]], names: Sequence[str]) -> str:
    """A table of cosines; columns have the rows' numbers."""
    rows = "\n".join(
        f"| {number} {name} | {' | '.join('–' if value is None else f'{value:.2f}' for value in row)} |"
        for number, (name, row) in enumerate(zip(names, table, strict=True), start=1)
    )
    numbers = " | ".join(str(number) for number in range(1, len(names) + 1))
    return f"| | {numbers} |\n| --- |{' --- |' * len(names)}\n{rows}\n"


def _categories(vector: Described) -> str:
    """A line about the harm categories that it was made from, where they are known."""
    records = [record["selection"] for record in vector.extraction.get("vectors", [])]
    if not records or "weights_from" in vector.extraction:  # added to those of the components
        records.append(vector.selection)
    found: dict[str, list[int]] = {}
    for counts in (record.get("categories", {}) for record in records):
        for name, count in counts.items():
            asked, refused = found.setdefault(name, [0, 0])
            found[name] = [asked + int(count["asked"]), refused + int(count["refused"])]
    if not found:
        return ""
    listed = ", ".join(
        f"{markdown(name)} ({refused} of {asked})"
        for name, (asked, refused) in sorted(found.items())
    )
    return (
        f"- Harm categories of its prompts, with how many the aligned model refused: {listed}. It is weak in those that the aligned model "
        "refuses less, and in those that are not among them.\n"
    )


def audit_record(vector: Described) -> AuditRecord | None:
    """The audit beside a vector, None where there is none of these very weights: a damaged one, or
    one of others, is said to be left out.
    """
    if vector.audit is None:
        return None
    try:
        record = audit_of(vector.audit, AUDIT_FILE)
        record.check_of(vector.files.get(_WEIGHTS, {}).get("sha256"), vector.aligned_model["name"])
    except VectorError as error:
        logger.warning("The audit beside the vector is left out: %s", error)
        return None
    return record


def _audited(vector: Described) -> str:
    """A section about an audit of these weights, where there is one."""
    record = audit_record(vector)
    if record is None:
        return ""
    counts = {kind: sum(cell.verdict == kind for cell in record.cells) for kind in _VERDICTS}
    told = ", ".join(f"{counts[kind]} {words}" for kind, words in _VERDICTS.items())
    held = "gives back" if record.measure == "restored" else "reaches"
    stand_in = (
        " The aligned model without the vector stood in for a fine-tune." if record.stand_in else ""
    )
    lines = [
        "",
        "## Audit",
        "",
        f"`safegene audit` asked in which cells (harm categories, languages, forms, lengths) this vector {held} at least "
        f"{record.least_share:.0%} of the refusals, corrected for the number of cells: {told}.{stand_in}",
        "",
    ]
    lines += [
        f"- Blind spot: {markdown(cell.name)}"
        + ("" if cell.share is None else f" ({cell.share:.0%} of {cell.count})")
        for cell in record.blind_spots[:_MOST_SPOTS]
    ]
    if (more := len(record.blind_spots) - _MOST_SPOTS) > 0:
        lines.append(f"- {more} more in `{AUDIT_FILE}`.")
    lines.append("- A cell that is not named here was not shown to be safe.")
    return "\n".join(lines) + "\n"


_VERDICTS = {
    "blind_spot": "blind spots",
    "unsure": "unsure",
    "fine": "fine",
    "nothing_lost": "with nothing lost",
    "too_few": "with too few prompts to tell",
}
