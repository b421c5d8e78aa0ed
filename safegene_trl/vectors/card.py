"""The model card of a safety vector. All that comes from its files is inert in it: names,
categories.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData

from ..errors import VectorError
from ..reporting.cards import hub_id
from ..text import code, markdown
from .audit_file import AUDIT_FILE, AuditRecord, audit_of
from .family import Family
from .prompt_rows import rows_of


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
pointing from a mildly degraded model to the aligned one. A fine-tune of the same family takes them on with learned
coefficients, one per module:

```python
from safegene_trl import SafeGeneCallback, SafeGeneConfig

callback = SafeGeneCallback(SafeGeneConfig(vector="path/or/hub-id"))  # for SFTTrainer or Trainer
```

- Made by: {code(vector.extraction["method"])}; layers selected by {code(vector.selection["method"])}.
- Comes with {harmful} harmful prompts and the aligned model's own refusals. It holds no harmful answers. Answers to benign
  prompts are the aligned model's own too: they mark behaviour and are not meant as facts.
{_further(vector)}{_categories(vector)}- Files, hashes and scores: `safegene_config.json`.
{_audited(vector)}
## Limits

It restores refusals that a fine-tune of *this* family has weakened, as far as the prompts it was made from cover them. It
does not make a model safe against determined attacks. Subtracting it would remove refusals: coefficients are never
negative in `safegene-trl`, and it must not be used that way elsewhere.
"""
    )


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
