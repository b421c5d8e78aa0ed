"""The safety step as one piece: prepare (everything that can fail early), then recalibrate, measure, merge and report.

The callback runs it where a training ends, `safegene apply` on a finished checkpoint.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .attach import attached
from .calibration import Row, padding_id
from .config import SafeGeneConfig
from .errors import ConfigError, RejectedError, SafeGeneError
from .family import Family
from .gate import Decision, check_measurable, decide
from .history import Release, append_release, base_warnings, last_accepted, read_history, release_of
from .lineage import (
    Coefficients,
    carried_coefficients,
    carries_vector,
    mark,
    of_granularity,
    reported_coefficients,
    vector_id,
)
from .measurement import measure
from .merging import checkpoint_bytes, save_adapter, save_merged
from .output import atomic_directory, check_output, check_writable, upload
from .provenance import check_base, sha256_of_file, software_versions
from .recalibration import Recalibration, recalibrate
from .reporting.report import SCHEMA_VERSION, PhaseClock, write_evidence, write_report
from .sharding import Sharding
from .shots import Shots, gather_shots
from .vector import SafetyVector
from .weights import base_model, canonical_modules, check_adapter_output, check_supported


logger = logging.getLogger(__name__)


@dataclass
class Preparation:
    """All that the safety step needs, read and checked before the first training step.

    Attributes:
        carried: Coefficients with which the model's weights hold the vector already, by name.
        start: Where the search starts, None for its default.
        report: What is known so far; the whole report in the end, also after a failure.
    """

    config: SafeGeneConfig
    vector: SafetyVector
    tokenizer: PreTrainedTokenizerBase
    target: Path
    shots: Shots
    sharding: Sharding
    carried: Coefficients
    start: Coefficients | None
    report: dict[str, Any]
    clock: PhaseClock = field(default_factory=PhaseClock)


def prepare(
    config: SafeGeneConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    sharding: Sharding,
    base_name: str | None = None,
    base_revision: str | None = None,
    task_rows: Sequence[Row] | IterableDataset | None = None,
) -> Preparation:
    """Reads and checks vector, family, data and output place; writes nothing.

    Collective, like everything here: every rank calls it, and if it fails on one it raises on all.

    Args:
        config: What to do.
        model: The model as it is now, plain or PEFT-wrapped; only its names and shapes matter here.
        tokenizer: Its tokenizer.
        target: Folder of the checkpoint to be.
        sharding: How the model is spread over ranks.
        base_name: Directory or hub id of the checkpoint that the fine-tune started from, None where it is not known.
        base_revision: Its revision.
        task_rows: The training set, used where `config.task_data` names no other.

    Raises:
        SafeGeneError: One of its kinds, saying what to do.
    """
    clock = PhaseClock()
    with clock.phase("prepare"), sharding.agreed():
        check_supported(model)
        if config.output_format != "merged":
            check_adapter_output(model)
        if sharding.is_main:
            check_output(target, 0 if config.output_format == "adapter" else checkpoint_bytes(model))
        vector, family, warnings = fitting_vector(config, model, tokenizer)
        context = getattr(base_model(model).config, "max_position_embeddings", None)
        shots = gather_shots(config, vector, tokenizer, context, task_rows)
        if config.gate:
            check_measurable(config.gate, shots.unseen.counts)
        carried = carried_coefficients(model, vector, config.granularity)
        base = check_base(
            base_name,
            base_revision,
            vector.aligned_model,
            config.allow_other_base,
            sharding.is_main,
            carries_vector(model),
        )
        start = _first_coefficients(config, vector)
        if sharding.is_main and config.history:
            check_writable(Path(config.history))
            warnings += base_warnings(read_history(Path(config.history)), base)
    for what, record in (
        ("SafeGene settings", config.to_dict()),
        ("a safety vector", vector.files),
        ("samples", shots.record),
        ("coefficients to start from", start),
    ):
        sharding.check_same(what, json.dumps(record, sort_keys=True))
    report = first_report(config, vector, family, warnings, base, isinstance(model, PeftModel), sharding)
    report["data"] = shots.record
    return Preparation(config, vector, tokenizer, target, shots, sharding, carried, start, report, clock)


def _first_coefficients(config: SafeGeneConfig, vector: SafetyVector) -> Coefficients | None:
    """Those of the release that the search is to start from, None where there is none."""
    if config.warm_start is not None:
        found = of_granularity(reported_coefficients(config.warm_start, vector), vector, config.granularity)
        if found is None:
            raise ConfigError(
                f"The coefficients in {config.warm_start} are not one per {config.granularity}: set `granularity` as it was there."
            )
        return found
    last = last_accepted(read_history(Path(config.history))) if config.history else None
    if last is None or last["vector"]["sha256"] != vector_id(vector):
        return None
    return of_granularity(last["coefficients"], vector, config.granularity)


def fitting_vector(
    config: SafeGeneConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[SafetyVector, Family, list[str]]:
    """The configured vector, the model's family, and warnings.

    Raises:
        SignatureError: The vector is not signed as configured.
        VectorError: The vector cannot be read.
        FamilyError: The model is not of its family.
    """
    vector = SafetyVector.from_pretrained(config.vector, revision=config.vector_revision, public_key=config.public_key)
    family = Family.of(model, tokenizer)
    warnings = vector.family.check_member(family)
    vector.check_fits(canonical_modules(model))
    return vector, family, warnings


def first_report(
    config: SafeGeneConfig,
    vector: SafetyVector,
    family: Family,
    warnings: list[str],
    base: dict[str, Any],
    is_lora: bool,
    sharding: Sharding,
) -> dict[str, Any]:
    """What a report says before anything has been measured."""
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "prepared",
        "warnings": warnings,
        "vector": {
            "name": config.vector,
            "revision": config.vector_revision,
            "signed_by": None if config.public_key is None else sha256_of_file(Path(config.public_key)),
            **vector.describe(),
        },
        "base": base,
        "model": {"kind": "lora" if is_lora else "full", **family.to_dict()},
        "launch": sharding.describe(),
        "config": config.to_dict(),
        "software": software_versions(),
    }


def safeguard(plan: Preparation, model: nn.Module, adapter_base: str, show_progress: bool = True) -> dict[str, Any]:
    """Recalibrates, measures, decides, merges and saves; returns the report that lies beside the checkpoint.

    After a failure the report goes to `failure_path`. The outcome is added to `config.history`.

    Args:
        plan: From `prepare`.
        model: The finished fine-tune; left as it is.
        adapter_base: Name of the checkpoint that a saved adapter is relative to.
        show_progress: Whether to show a progress bar.

    Raises:
        RejectedError: No coefficients are acceptable, or the gate's limits are not kept. No checkpoint is written.
        RecalibrationError: The recalibration loss is not finite.
        OutputError: The checkpoint cannot be written. Nothing of it is left.
    """
    try:
        with plan.sharding.named():
            _safeguard(plan, model, adapter_base, show_progress)
    except SafeGeneError as error:
        _write_failure(plan, error)
        raise
    return plan.report


def _safeguard(plan: Preparation, model: nn.Module, adapter_base: str, show_progress: bool) -> None:
    config, vector, sharding = plan.config, plan.vector, plan.sharding
    sharding.release()
    result = _recalibrate(plan, model, show_progress)
    plan.report |= _found(result)
    change = {name: value - plan.carried[name] for name, value in result.coefficients.items()}
    by_module = vector.by_module(change, config.granularity)
    measured = None
    if any(plan.shots.unseen.counts.values()) and (result.accepted or config.gate):
        with plan.clock.phase("measure"):
            measured = plan.report["measured"] = _measure(plan, model, by_module)
    decision = decide(config.gate, result.accepted, result.scale, result.reason, measured)
    plan.report["decision"] = {**decision.to_dict(), "scale": result.scale}
    if not result.accepted and decision.outcome != "rejected":  # nothing was changed
        plan.report["held_out"]["after"] = plan.report["held_out"]["before"]
    if decision.outcome == "rejected" and not (config.gate and config.gate.write_rejected):
        _add_to_history(plan)
        raise RejectedError(_rejection(decision))
    with atomic_directory(plan.target, sharding=sharding) as folder:
        with plan.clock.phase("save"):
            _save(plan, model, by_module, result.coefficients, adapter_base, folder)
        plan.report |= {"status": "safeguarded", "phases": plan.clock.phases}
        if sharding.is_main:
            write_evidence(plan.report, folder, plan.target.name, _releases(plan))
    if sharding.is_main:
        _remove_failure(plan.target)
    _add_to_history(plan)
    with sharding.agreed():
        if sharding.is_main and config.hub_model_id and decision.outcome != "rejected":
            upload(plan.target, config.hub_model_id, config.hub_private)


def _remove_failure(target: Path) -> None:
    """Removes what an earlier failed run has left beside the checkpoint, which is finished whether that can be removed or not."""
    for suffix in (".json", ".html", ".coefficients.png", ".history.png"):
        path = failure_path(target).with_suffix(suffix)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is of an earlier run and cannot be removed: %s", path, error)


def _rejection(decision: Decision) -> str:
    if decision.checks:
        return f"{decision.reason} No checkpoint was written: give more safety data, use a stronger vector, or set `gate.write_rejected`."
    return (
        f"{decision.reason} No checkpoint was written: give other or more safety data, allow a larger `max_utility_loss`, or use a "
        "stronger vector; a fine-tune that needs no repair passes where a `gate` says what it must keep."
    )


def _recalibrate(plan: Preparation, model: nn.Module, show_progress: bool) -> Recalibration:
    config, vector, sharding = plan.config, plan.vector, plan.sharding
    hidden = not (show_progress and sharding.is_main)
    with tqdm(total=config.max_evaluations, desc="Recalibrating", disable=hidden, leave=False) as bar:

        def advance(entry: dict) -> None:
            bar.update()
            bar.set_postfix({key: f"{entry[key]:.3f}" for key in ("safety", "utility")})

        with plan.clock.phase("recalibrate"):
            return recalibrate(
                model,
                vector.deltas,
                vector.coefficient_names(config.granularity),
                plan.shots.data,
                config,
                padding_id(plan.tokenizer),
                sharding,
                advance,
                plan.carried,
                plan.start,
            )


def _releases(plan: Preparation) -> list[Release]:
    """The model line as it will be with this release; empty where none is kept."""
    if not plan.config.history:
        return []
    earlier = read_history(Path(plan.config.history))
    return [*earlier, release_of(plan.report, plan.target)] if "decision" in plan.report else earlier


def _add_to_history(plan: Preparation) -> None:
    with plan.sharding.agreed():
        if plan.sharding.is_main and plan.config.history:
            append_release(Path(plan.config.history), release_of(plan.report, plan.target))


def dry_run_message(target: Path) -> str:
    """What a dry run says when all is well."""
    return f"Dry run: all checks passed; the safeguarded checkpoint would go to {target}."


def failure_path(target: Path) -> Path:
    """Where the report of a failed safety step goes: beside the folder that was not written."""
    return target.with_name(f"{target.name}.failed.json")


def _write_failure(plan: Preparation, error: Exception) -> None:
    """Writes what was known and what failed to `failure_path`, on rank 0."""
    failure = {"kind": type(error).__name__, "message": str(error)}
    plan.report |= {"status": "failed", "error": failure, "phases": plan.clock.phases}
    if plan.sharding.is_main:
        try:
            write_report(plan.report, failure_path(plan.target), _releases(plan))
        except (OSError, SafeGeneError) as unwritten:  # a full disk may be what failed
            logger.warning("%s cannot be written: %s", failure_path(plan.target), unwritten)


def _found(result: Recalibration) -> dict[str, Any]:
    return {
        "coefficients": result.coefficients,
        "held_out": {"before": result.held_out_before.to_dict(), "after": result.held_out_after.to_dict()},
        "history": result.history,
    }


def _measure(plan: Preparation, model: nn.Module, by_module: dict[str, torch.Tensor]) -> dict[str, Any]:
    config, deltas, sharding = plan.config, plan.vector.deltas, plan.sharding
    coefficients = torch.cat([by_module[module] for module in deltas]).to(sharding.device)
    index = dict(zip(deltas, torch.arange(len(coefficients)).split(plan.vector.rank), strict=True))
    with_vector = partial(attached, model, deltas, index, coefficients)
    return measure(model, with_vector, plan.shots.unseen, plan.tokenizer, config, sharding)


def _save(
    plan: Preparation,
    model: nn.Module,
    by_module: dict[str, torch.Tensor],
    coefficients: Coefficients,
    adapter_base: str,
    folder: Path,
) -> None:
    config, deltas, tokenizer, sharding = plan.config, plan.vector.deltas, plan.tokenizer, plan.sharding
    if config.output_format in ("merged", "both"):
        entry = mark(plan.vector, coefficients)
        save_merged(model, deltas, by_module, tokenizer, folder, config.max_shard_size, sharding, entry)
    if config.output_format in ("adapter", "both"):
        place = folder / "adapter" if config.output_format == "both" else folder
        save_adapter(model, deltas, by_module, adapter_base, tokenizer, place, sharding)
