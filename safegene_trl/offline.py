"""The safety step on a finished model with coefficients that are known already: nothing is loaded or measured."""

import math
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel

from .attach import LowRankDelta
from .config import Granularity, SafeGeneConfig
from .errors import ConfigError
from .extraction.delta import adapter_delta, stored_delta
from .gate import Decision
from .history import append_release, release_of
from .interference import interference_coefficients
from .lineage import (
    Coefficients,
    carried_coefficients,
    carries_vector,
    check_not_safeguarded,
    coefficient_names,
    mark,
    reported_coefficients,
)
from .loading import adapter_base, load_tokenizer
from .merging import save_adapter
from .output import atomic_directory, check_output, upload
from .provenance import check_base
from .reporting.report import PhaseClock, write_evidence
from .safeguard import first_report, fitting_vector
from .sharding import Sharding
from .streaming import StoredModel, write_merged
from .vector import SafetyVector
from .weights import check_adapter_output


INTERFERENCE = "interference"
TASK_RANK = 64  # of a full fine-tune's change, where its interference with the vector is weighed


def safeguard_stored(
    config: SafeGeneConfig,
    name_or_path: str,
    revision: str | None,
    given: str,
    target: Path,
    base_model: str | None = None,
) -> dict[str, Any]:
    """Merges the vector into a finished checkpoint or adapter from its files; returns the report.

    Args:
        config: What to do; all about shots and the search is ignored.
        name_or_path: Directory or hub id of the checkpoint or adapter.
        revision: Its branch, tag or commit on the hub.
        given: One number (the coefficient of every layer), or the report of an earlier safety step with this vector: a
            file, or the folder it lies in; or `interference`, EnchTable's rule.
        target: Folder of the checkpoint to be.
        base_model: The aligned model, from which `interference` tells a full fine-tune's own change.

    Raises:
        SafeGeneError: One of its kinds, before anything is written.
    """
    clock, alone = PhaseClock(), Sharding(torch.device("cpu"))
    with clock.phase("prepare"):
        check_not_safeguarded(name_or_path, revision)
        stored = StoredModel.open(name_or_path, revision)
        if config.output_format != "merged":
            check_adapter_output(stored.model)
        tokenizer = load_tokenizer(name_or_path, revision)
        vector, family, warnings = fitting_vector(config, stored.model, tokenizer)
        if given == INTERFERENCE:
            coefficients, granularity = _interference(stored, base_model, vector), "module"
        else:
            coefficients, granularity = _given_coefficients(given, vector, config.granularity)
        carried = carried_coefficients(stored.model, vector, granularity)
        change = {name: value - carried[name] for name, value in coefficients.items()}
        by_module = vector.by_module(change, granularity)
        started_from = adapter_base(name_or_path, revision)
        base = check_base(
            base_model or started_from,
            None,
            vector.aligned_model,
            config.allow_other_base,
            carries_vector=carries_vector(stored.model),
        )
        needed = 0 if config.output_format == "adapter" else sum(t.num_bytes for t in stored.files.values())
        check_output(target, needed)
    decision = Decision("accepted", "The coefficients were given: nothing was measured.")
    report = first_report(config, vector, family, warnings, base, isinstance(stored.model, PeftModel), alone) | {
        "decision": {**decision.to_dict(), "scale": 1.0},
        "coefficients": coefficients,
    }
    if config.dry_run:
        return report
    with atomic_directory(target) as folder:
        with clock.phase("save"):
            if config.output_format in ("merged", "both"):
                entry = mark(vector, coefficients)
                write_merged(stored, vector.deltas, by_module, tokenizer, folder, config.max_shard_size, entry)
            if config.output_format in ("adapter", "both"):
                place = folder / "adapter" if config.output_format == "both" else folder
                relative_to = started_from or name_or_path
                save_adapter(stored.model, vector.deltas, by_module, relative_to, tokenizer, place, alone)
        report |= {"status": "safeguarded", "phases": clock.phases}
        write_evidence(report, folder, target.name)
    if config.history:
        append_release(Path(config.history), release_of(report, target))
    if config.hub_model_id:
        upload(target, config.hub_model_id, config.hub_private)
    return report


def _interference(stored: StoredModel, base_model: str | None, vector: SafetyVector) -> Coefficients:
    by_module = interference_coefficients(_task_deltas(stored, base_model), vector.deltas)
    return {name: by_module[module] for module, own in vector.coefficient_names("module").items() for name in own}


def _task_deltas(stored: StoredModel, base_model: str | None) -> dict[str, LowRankDelta]:
    """The fine-tune's own change of every linear layer, of an adapter exactly."""
    if isinstance(stored.model, PeftModel) and not stored.has_full_rank_changes:
        found = adapter_delta(stored.model, torch.nn.Module())
    elif base_model is None:
        raise ConfigError("The fine-tune's change cannot be told without the aligned model: name it as `base_model`.")
    else:
        found = stored_delta(stored, StoredModel.open(base_model), TASK_RANK)
    return {name: truncation.delta for name, truncation in found.items()}


def _given_coefficients(
    given: str, vector: SafetyVector, granularity: Granularity
) -> tuple[Coefficients, Granularity]:
    """The coefficients by name, and their granularity."""
    try:
        value = float(given)
    except ValueError:
        coefficients = reported_coefficients(given, vector)
    else:
        coefficients = dict.fromkeys(coefficient_names(vector, granularity), value)
    for name, coefficient in coefficients.items():
        if not (math.isfinite(coefficient) and coefficient >= 0):
            raise ConfigError(
                f"The coefficient of `{name}` is {coefficient}: it must be 0 or more, −V removes refusals."
            )
    for kind in get_args(Granularity):
        if set(coefficient_names(vector, kind)) == set(coefficients):
            return coefficients, kind
    raise ConfigError(
        f"The coefficients in {given} are not those of this vector's layers, modules or rank-one parts: name another report."
    )
