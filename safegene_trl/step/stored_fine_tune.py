"""A finished model on a disk, with coefficients that are known already, as a fine-tune of the
safety step.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..checkpoints.adapter_output import save_adapter
from ..checkpoints.loading import load_processor
from ..checkpoints.merge_terms import ScaledVector
from ..checkpoints.source import adapter_base, further_adapters
from ..checkpoints.stored_merge import write_merged
from ..checkpoints.stored_model import StoredModel
from ..checkpoints.tensor_file import StoredTensor
from ..config.search import INTERFERENCE, LARGEST_COEFFICIENT, Granularity
from ..config.settings import SafeGeneConfig
from ..distributed.layouts import Sharding
from ..errors import ConfigError, OutputError
from ..extraction.delta import adapter_delta, stored_delta
from ..models.coefficients import CoefficientSpace
from ..models.low_rank import LowRankDelta
from ..models.rounding import Rounding
from ..models.supported import check_adapter_output
from ..vectors.safety_vector import SafetyVector
from .decision import Decision
from .interference import interference_coefficients
from .lineage import (
    ROUNDING,
    Carried,
    Coefficients,
    check_coefficients_are_all,
    check_no_subtraction,
    reported_coefficients,
)
from .plan import FINE_TUNE, Found, InputModel, Origin, Plan, check_base_vocabulary, plan_step
from .run import run


TASK_RANK = 64  # of a full fine-tune's change, where its interference with the vector is weighed


def merge_stored(
    config: SafeGeneConfig,
    name_or_path: str,
    revision: str | None,
    given: str,
    target: Path,
    base_model: str | None,
    files: dict[str, StoredTensor],
) -> dict[str, Any]:
    """As `safeguard_stored`, on a checkpoint whose headers are read already (`files`)."""
    stored = StoredModel.open(name_or_path, revision, files)
    if config.output.output_format != "merged":
        check_adapter_output(stored.model)
    started_from = adapter_base(name_or_path, revision)
    is_lora = isinstance(stored.model, PeftModel)
    origin = Origin(
        base_model or started_from, None, "lora" if is_lora else "full", {FINE_TUNE: name_or_path}
    )
    if config.output.output_format != "merged":
        check_base_vocabulary(stored.model, origin)
    alone = Sharding(torch.device("cpu"))
    input_model = InputModel(stored.model, load_processor(name_or_path, revision), origin)
    stored.types = input_model.written_types(config)
    needed = 0 if config.output.output_format == "adapter" else stored.written_bytes
    plan = plan_step(config, input_model, target, alone, needed)
    fine_tune = StoredFineTune(plan, stored, name_or_path, started_from or name_or_path)
    with plan.clock.phase("prepare"):
        fine_tune.choose(given, base_model)
    plan.report.warnings += further_adapters(name_or_path)
    plan.warn()
    return plan.report.to_dict() if config.dry_run else run(plan, fine_tune)


class StoredFineTune:
    """A finished checkpoint or adapter, from file to file, with coefficients that somebody gives."""

    def __init__(self, plan: Plan, stored: StoredModel, name: str, relative_to: str):
        self.plan, self.stored, self.relative_to = plan, stored, relative_to
        self.name = name
        self.coefficients: Coefficients = {}
        self._rounding: Rounding | None = None

    def choose(self, given: str, base_model: str | None) -> None:
        """Reads the coefficients that `given` stands for."""
        plan, vector = self.plan, self.plan.vector
        granularity: Granularity = "module"
        if given == INTERFERENCE:
            by_module = interference_coefficients(
                _task_deltas(self.stored, base_model), vector.deltas
            )
            names = vector.space(granularity).modules.items()
            self.coefficients = {name: by_module[module] for module, own in names for name in own}
        else:
            self.coefficients, granularity = given_coefficients(given, vector, plan.granularity)
        plan.find_carried(self.stored.model, granularity)
        change = {name: value - plan.carried[name] for name, value in self.coefficients.items()}
        check_no_subtraction(change, plan.carried)
        _check_adds(self.coefficients, plan.carried)
        plan.report.coefficients = self.coefficients

    def keep(self) -> str:
        """It is on a disk, or on the hub."""
        return self.name

    def find(self) -> Found:
        """The given coefficients, as they are."""
        space = self.plan.vector.space(self.plan.granularity)
        change = {
            name: value - self.plan.carried[name] for name, value in self.coefficients.items()
        }
        decision = Decision("accepted", "The coefficients were given: nothing was measured.")
        added = ScaledVector(self.plan.vector.deltas, space.by_module(change))
        return Found(self.coefficients, decision, added)

    def write(self, folder: Path, found: Found) -> dict[str, str]:
        """Writes the merged checkpoint, the adapter, or both."""
        plan, vector = self.plan, found.added
        digests: dict[str, str] = {}
        if plan.merges:
            checkpoint = plan.merged_folder(folder, found)
            self._rounding = write_merged(self.stored, vector, checkpoint)
            digests = checkpoint.digests
            # not even by the float32 sum: else `write_merged` has refused it
            if not self._rounding.changed:
                raise OutputError(
                    f"The safety vector vanishes beside the weights: 0 of {self._rounding.weights} would change even in float32; use "
                    "larger coefficients."
                )
        if place := plan.adapter_place(folder):
            model, base = self.stored.model, self.relative_to
            save_adapter(model, vector, base, plan.processor, place, plan.sharding)
        return digests

    def compare(self, folder: Path) -> dict[str, Any]:
        """What rounding has left; nothing was measured that the files could be held against."""
        return {} if self._rounding is None else {"rounding": self._rounding.check()}


def _check_adds(coefficients: Coefficients, carried: Carried) -> None:
    """Raises `ConfigError` where the weights hold all of it already: what was merged would be the
    fine-tune as it is.
    """
    if any(abs(value - carried[name]) > ROUNDING for name, value in coefficients.items()):
        return
    largest = max(coefficients.values())
    if any(carried.values()):
        why = "the model's weights carry the vector with these coefficients already: there is nothing to add"
    elif largest == 0:
        why = "the coefficients are all 0: name larger ones"
    else:
        why = f"the largest coefficient is {largest:.3g}, too small to be told from 0: name larger ones"
    raise ConfigError(f"No weight would change, because {why}.")


def _task_deltas(stored: StoredModel, base_model: str | None) -> dict[str, LowRankDelta]:
    """The fine-tune's own change of every linear layer, of an adapter exactly."""
    if isinstance(stored.model, PeftModel) and not stored.has_full_rank_changes:
        found = adapter_delta(stored.model, torch.nn.Module())
    elif base_model is None:
        raise ConfigError(
            "The fine-tune's change cannot be told without the aligned model: name it as `base_model`."
        )
    else:
        found = stored_delta(stored, StoredModel.open(base_model), TASK_RANK)
    return {name: truncation.delta for name, truncation in found.items()}


def given_coefficients(
    given: str, vector: SafetyVector, granularity: Granularity
) -> tuple[Coefficients, Granularity]:
    """The coefficients by name, and their granularity."""
    try:
        value = float(given)
    except ValueError:
        coefficients = reported_coefficients(given, vector)
        check_coefficients_are_all(given)
    else:
        coefficients = dict.fromkeys(vector.space(granularity).names, value)
    for name, coefficient in coefficients.items():
        if not 0 <= coefficient <= LARGEST_COEFFICIENT:
            raise ConfigError(
                f"The coefficient of `{name}` is {coefficient}: it must be 0 or more (−V removes refusals) and at most "
                f"{LARGEST_COEFFICIENT:g}."
            )
    kind = CoefficientSpace.granularity_of(
        coefficients, vector.deltas, vector.components, vector.component_names
    )
    if kind is None:
        raise ConfigError(
            f"The coefficients in {given} are not those of this vector's layers, modules or rank-one parts: name another "
            "report."
        )
    return coefficients, kind
