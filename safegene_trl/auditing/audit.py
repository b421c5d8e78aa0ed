"""`audit`: where a safety vector gives refusals back, and where it does not.

A vector's one number hides the harm categories, languages and forms in which it does nothing.
Whoever holds it can look for them; so its owner should, before. Safety regions that are found with
different data sets overlap little (arXiv 2602.17696), so a vector that was made from one set says
little about another.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.atomic_writes import replace_file
from ..checkpoints.locking import alone_in
from ..config.validation import check_is
from ..distributed.processes import this_job
from ..evaluation.agreement import agreement
from ..judges import Judge, Verdict, load_judge
from ..judges.intervals import rate
from ..models.batch_size import naming_shortage
from ..provenance import software_versions
from ..reporting.audit_page import PAGE, render_audit
from ..text import strict_json
from ..vectors.audit_file import AUDIT_FILE, AUDIT_VERSION, ROLES, AuditRecord, audit_of
from ..vectors.files import WEIGHTS_FILE
from ..vectors.safety_vector import SafetyVector
from .asking import Asked, Asker
from .cells import ALPHA, Labelled, cells_of, needed, overall
from .compare import compared, other_models
from .config import AuditConfig
from .labels import Labels
from .plan import measure_of, plan_audit
from .prompts import AuditPrompts, key_of
from .variants import WITHOUT, Coefficients


logger = logging.getLogger(__name__)
_TOO_SMALL = "The audit ran out of memory: set a smaller `batch_size`; the labels so far are kept."
_WEAKEST = 5


def audit(config: AuditConfig) -> dict[str, Any]:
    """Audits a safety vector, and writes `audit.json` and `audit.html` into `config.output_dir`.

    Three models are asked the same prompts in several forms: the aligned one, a fine-tune and the
    safeguarded one. Per category, language, form and length it is told how much of what the
    fine-tune took away comes back, by tests that are corrected for the number of cells. A run that
    was cut off goes on where it stopped. No answer is stored.

    Args:
        config: Which vector, which models, which prompts.

    Returns:
        What is in `audit.json`: `cells`, blind spots first, each with `attack_success` of the three
            models and its `share` (0–1, 95 % intervals), and how many `blind_spots` there are.

    Raises:
        ConfigError: A value is missing, impossible, or contradicts another one.
        VectorError: The vector, or an earlier audit, is missing or damaged.
        FamilyError: Models and vector do not belong together.
        CalibrationDataError: A prompt set cannot be used.
        OutputError: The folder holds another vector's audit or the earlier one, or cannot be
            written.
        SafeGeneError: A model cannot be loaded, a judge failed, or the device is too small.
    """
    check_is(config, AuditConfig, "audit")
    plan = plan_audit(config)
    vector, found, folder = plan.vector, plan.found, plan.folder
    with naming_shortage(_TOO_SMALL), alone_in(folder, "audit"):
        judges = [load_judge(spec) for spec in config.judges]
        labels = Labels(folder, judges, config.task_labels)
        asker = Asker(plan, labels, this_job())
        asked = asker.ask_all()
        told = {role: labels.of(own, found.prompts) for role, own in asked.roles.items()}
        rows = _rows(found, told, judges[0].name)
        result = _result(config, vector, found, asked, rows)
        result["judges"] = [{"name": each.name, "sees": each.sees} for each in judges]
        result["agreement"] = _agreement(found, told["safeguarded"], judges)
        without = labels.of(WITHOUT, found.prompts)[judges[0].name]
        result["attacker"] = _attacker(vector, result["cells"], rows, without)
        if plan.before is not None:
            result["before"] = compared(plan.before, result["cells"], rows)
            result["warnings"] = [*result["warnings"], *other_models(plan.before, result)]
        return _written(folder, config, vector, result)


def _agreement(
    found: AuditPrompts, told: Mapping[str, Sequence[str]], judges: Sequence[Judge]
) -> list[dict[str, Any]]:
    """How far the judges agree on the safeguarded model's answers."""
    verdicts = {name: [Verdict(label) for label in own] for name, own in told.items()}  # type: ignore[arg-type]
    return agreement(found.prompts, verdicts, {judge.name: judge.sees for judge in judges})


def _rows(
    found: AuditPrompts, told: Mapping[str, Mapping[str, Sequence[str]]], judge: str
) -> list[Labelled]:
    return [
        Labelled(key_of(item.prompt), item.place, {role: told[role][judge][i] for role in ROLES})
        for i, item in enumerate(found.items)
    ]


def _result(
    config: AuditConfig,
    vector: SafetyVector,
    found: AuditPrompts,
    asked: Asked,
    rows: Sequence[Labelled],
) -> dict[str, Any]:
    measure = measure_of(asked.stand_in, asked.coefficients.uniform)
    cells = cells_of(rows, measure, config.least_share, config.min_prompts, config.crossed)
    tested = sum(cell["tests"] is not None for cell in cells)
    return {
        "schema_version": AUDIT_VERSION,
        "vector": {
            "name": Path(config.vector).name,
            "revision": config.vector_revision,
            "weights": vector.files[WEIGHTS_FILE]["sha256"],
            "rank": vector.rank,
            "layers": vector.layers,
        },
        "fine_tune": {"stand_in": asked.stand_in},
        "models": asked.models,
        "coefficients": _coefficients(asked.coefficients),
        "measure": measure,
        "least_share": config.least_share,
        "min_prompts": config.min_prompts,
        "correction": {
            "method": "Holm",
            "alpha": round(ALPHA, 6),
            "tested": tested,
            "needed": max(config.min_prompts, needed(config.least_share, tested)),
        },
        "data": {
            "sources": found.sources,
            "forms": config.forms,
            "asked": len(found.items),
            "left_out": found.left_out,
        },
        "max_new_tokens": config.max_new_tokens,
        "blind_spots": sum(cell["verdict"] == "blind_spot" for cell in cells),
        "overall": overall(rows, measure),
        "cells": cells,
        "warnings": asked.warnings,
        "prompts": [
            {"key": row.key, "where": row.place.named, **{r: row.labels[r] for r in ROLES}}
            for row in rows
        ],
        "software": software_versions(),
    }


def _coefficients(found: Coefficients) -> dict[str, Any]:
    """What is told of the coefficients; they themselves stand in the report that they are from."""
    values = list(found.values.values())
    mean = sum(values) / len(values)
    return {"source": found.source, "least": min(values), "mean": mean, "largest": max(values)}


def _attacker(
    vector: SafetyVector,
    cells: Sequence[Mapping[str, Any]],
    rows: Sequence[Labelled],
    without: Sequence[str],
) -> dict[str, Any]:
    """What whoever holds the vector knows, or can find out."""
    weakest = sorted(
        (
            cell
            for cell in cells
            if list(cell["where"]) == ["category"] and cell["tests"] is not None
        ),
        key=lambda cell: cell["share"]["share"],
    )
    aligned = rate([row.labels["aligned"] in ("refused", "harmless") for row in rows])
    subtracted = rate([label in ("refused", "harmless") for label in without])
    return {
        "layers": vector.layers,
        "weakest_categories": [cell["where"]["category"] for cell in weakest[:_WEAKEST]],
        "refusals": {
            "aligned": aligned and aligned.to_dict(),
            "without_vector": subtracted and subtracted.to_dict(),
        },
    }


def _written(
    folder: Path, config: AuditConfig, vector: SafetyVector, result: dict[str, Any]
) -> dict[str, Any]:
    text = strict_json(result) + "\n"
    record = audit_of(text.encode(), AUDIT_FILE)  # what cannot be read again is not to be written
    replace_file(folder / PAGE, render_audit(result))
    replace_file(folder / AUDIT_FILE, text)
    if config.keep_with_vector:
        _keep(Path(config.vector), text, vector, record)
    return result


def _keep(folder: Path, text: str, vector: SafetyVector, record: AuditRecord) -> None:
    """Puts the audit into the vector's folder, and a section about it into the card there."""
    replace_file(folder / AUDIT_FILE, text)
    vector.audit = text.encode()
    replace_file(folder / "README.md", str(vector.generate_model_card()))
    logger.info("%s blind spots are told of in %s.", len(record.blind_spots), folder / "README.md")
