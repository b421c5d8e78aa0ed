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
from ..distributed.world_size import launched_processes
from ..errors import ConfigError, OutputError, VectorError
from ..evaluation.agreement import agreement
from ..judges import Judge, Verdict, load_judge
from ..judges.intervals import rate
from ..models.batch_size import naming_shortage
from ..provenance import software_versions
from ..reporting.audit_page import PAGE, render_audit
from ..text import strict_json
from ..vectors.audit_file import AUDIT_FILE, AUDIT_VERSION, ROLES, AuditRecord, audit_of, read_audit
from ..vectors.files import CONFIG_FILE, WEIGHTS_FILE, read_files
from ..vectors.safety_vector import SafetyVector
from .asking import Asked, Asker
from .cells import ALPHA, Labelled, cells_of, needed, overall
from .compare import check_comparable, compared
from .config import AuditConfig
from .labels import Labels
from .prompts import AuditPrompts, key_of, read_items
from .variants import WITHOUT, Coefficients, check_entry, check_not_folded, chosen_coefficients


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
    config.check()
    if launched_processes() > 1:
        raise ConfigError("An audit is one process's work: leave out the launcher.")
    key = None if config.public_key is None else Path(config.public_key)
    contents = read_files(config.vector, revision=config.vector_revision)
    vector = SafetyVector.from_files(contents, config.vector, key)
    before = read_audit(config.before) if config.before else None
    chosen = chosen_coefficients(config, vector)
    aligned, model = _aligned_name(config, vector), config.model or config.safeguarded
    if model:
        check_not_folded(model, config.model_revision)
        check_entry(model, config.model_revision)
    found = read_items(config, vector)
    if before is not None:
        measure = _measure(not model, chosen is None or chosen.uniform)
        keys = set(map(key_of, found.prompts))
        check_comparable(before, measure, config.least_share, keys)
    folder = Path(config.output_dir)
    _check_folder(folder, config, vector, [aligned, model])
    with naming_shortage(_TOO_SMALL), alone_in(folder, "audit"):
        judges = [load_judge(spec) for spec in config.judges]
        labels = Labels(folder, judges, config.task_labels)
        asker = Asker(config, vector, contents, found.prompts, labels, this_job())
        asked = asker.ask_all(aligned, chosen, model)
        told = {role: labels.of(own, found.prompts) for role, own in asked.roles.items()}
        rows = _rows(found, told, judges[0].name)
        result = _result(config, vector, found, asked, rows)
        result["judges"] = [{"name": each.name, "sees": each.sees} for each in judges]
        result["agreement"] = _agreement(found, told["safeguarded"], judges)
        without = labels.of(WITHOUT, found.prompts)[judges[0].name]
        result["attacker"] = _attacker(vector, result["cells"], rows, without)
        if before is not None:
            result["before"] = compared(before, result["cells"], rows)
        return _written(folder, config, vector, result)


def _aligned_name(config: AuditConfig, vector: SafetyVector) -> str:
    name = config.aligned_model or str(vector.aligned_model["name"])
    if not config.aligned_model and "/" not in name and not Path(name).is_dir():
        raise ConfigError(
            f"The vector was made from a model in a folder called {name}: name that folder as `aligned_model`."
        )
    return name


def _check_folder(
    folder: Path, config: AuditConfig, vector: SafetyVector, models: Sequence[str]
) -> None:
    """Raises `OutputError` for a folder that is read as something else or holds an audit that is still
    needed, and for a vector that is in no folder and is to keep the audit.
    """
    _check_other_audit(folder, config, vector)
    if config.keep_with_vector and not (Path(config.vector) / CONFIG_FILE).is_file():
        raise OutputError(
            f"{config.vector} is no folder here, and `keep_with_vector` is set: download the vector, and audit that."
        )
    read = (*models, config.safeguarded, config.vector)
    for one in (*read, *config.harmful_data, *config.exclude_data):
        if one and folder.is_dir() and Path(one).is_dir() and folder.samefile(one):
            raise OutputError(
                f"{folder} is read as {one}, and would be written into: choose another `output_dir`."
            )


def _check_other_audit(folder: Path, config: AuditConfig, vector: SafetyVector) -> None:
    """Raises `OutputError` where an audit that is still needed would be replaced."""
    there = folder / AUDIT_FILE
    if not there.exists():
        return
    if config.before and Path(config.before).exists() and there.samefile(config.before):
        raise OutputError(
            f"{there} is the earlier audit, and the new one would replace it: choose another `output_dir`."
        )
    try:
        weights = read_audit(str(there)).weights
    except VectorError:  # damaged, or of another version: nothing that is still of use
        return
    if weights != vector.files[WEIGHTS_FILE]["sha256"]:
        raise OutputError(
            f"{folder} holds the audit of another vector: choose another `output_dir`, or delete that folder."
        )


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
    measure = _measure(asked.stand_in, asked.coefficients.uniform)
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


def _measure(stand_in: bool, uniform: bool) -> str:
    """With all of the vector back the aligned model answers: what came back says nothing."""
    return "reach" if stand_in and uniform else "restored"


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
