"""The safety step where the fine-tune's base is quantised: what is measured on what, and what is
merged into what.

Coefficients are found, tried and measured on the quantised base, with the LoRA and the vector
beside its weights. A merged checkpoint is written from the files of the 16-bit base. So what is
shipped is not quite what was measured: the report says so, and every written tensor is held
against the sum that it should be.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.checkpoint_folder import CheckpointFolder
from ..checkpoints.merge_terms import ScaledVector
from ..checkpoints.quantized_base import QuantizedFineTune, check_base, open_base
from ..checkpoints.stored_merge import check_written, write_merged
from ..checkpoints.stored_model import StoredModel
from ..config.settings import SafeGeneConfig
from ..distributed.layouts import Sharding
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..models.data_types import WrittenTypes
from ..models.parameters import base_model
from ..models.quantized import describe_quantized
from ..models.rounding import Rounding
from .plan import InputModel, Plan


@dataclass
class QuantizedStep:
    """What the step has to know of a quantised base.

    Attributes:
        kind: How it is quantised.
        base: The 16-bit model to merge into; None where nothing is merged, and on other ranks than
            0.
    """

    kind: str
    base: StoredModel | None
    _seen: dict[Path, tuple[int, ...]] = field(default_factory=dict)

    @property
    def needed_bytes(self) -> int:
        """Size of the merged checkpoint's weights."""
        return self.base.written_bytes if self.base else 0

    def check(self, model: nn.Module, plan: Plan) -> None:
        """Raises where the files are not those of the live base; says in the report what is
        measured on what.
        """
        written = []
        if self.base is not None:
            fine_tune = QuantizedFineTune.on(self.base, model)
            self._seen = _identities(self.base)
            check_base(fine_tune, plan.vector.deltas)
            written.append(f"merged into the {fine_tune.dtype} base {self.base.name}")
            plan.report.warnings.append(
                f"The fine-tune has a {self.kind}: coefficients are found and measured on that, with the LoRA and the vector "
                f"beside it. The checkpoint is {written[0]}, and is not measured itself: `safegene apply` on the saved "
                "adapter, with that base in its `adapter_config.json`, measures what it writes."
            )
        if plan.config.output.output_format != "merged":
            written.append("an adapter")
        side = f"{self.kind}, LoRA and vector beside it"
        plan.report.shipped = {
            "base": {"recalibrated_on": side, "measured_on": side, "written": "; ".join(written)}
        }

    def write(
        self, model: nn.Module, vector: ScaledVector, folder: CheckpointFolder, show_progress: bool
    ) -> "MergedIntoBase":
        """Writes the merged checkpoint; on rank 0 only."""
        assert self.base is not None
        fine_tune = QuantizedFineTune.on(self.base, model)
        self._check_unchanged()
        rounding = write_merged(fine_tune, vector, folder, show_progress)
        self._check_unchanged()
        return MergedIntoBase(fine_tune, vector, rounding)

    def _check_unchanged(self) -> None:
        """Raises `CheckpointError` if the base's files are no longer those that were checked."""
        assert self.base is not None
        if _identities(self.base) != self._seen:
            raise CheckpointError(
                f"The files of {self.base.name} have changed since the training began: put those back that it was trained on, and "
                "run `safegene apply` on the saved fine-tune."
            )


def _identities(base: StoredModel) -> dict[Path, tuple[int, ...]]:
    """What tells that a base's files are the same as before: size, time of the last change, place
    on the disk.
    """
    found: dict[Path, tuple[int, ...]] = {}
    for path in {file.path for file in base.files.values()}:
        status = path.stat()
        found[path] = (status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)
    return found


@dataclass
class MergedIntoBase:
    """What was written into a checkpoint."""

    fine_tune: QuantizedFineTune
    vector: ScaledVector
    rounding: Rounding

    def check(self, folder: Path) -> dict[str, Any]:
        """For the report: what rounding left of the vector, and how many tensors were read back and
        are what they should be, bit by bit.

        Raises:
            CheckpointError: One is another.
        """
        tensors = check_written(self.fine_tune, self.vector, folder)
        return {"rounding": self.rounding.check(), "exact_tensors": tensors}


def quantized_step(
    config: SafeGeneConfig, given: InputModel, sharding: Sharding
) -> QuantizedStep | None:
    """Collective: what the step needs where the base of a live fine-tune is quantised; None where it
    is not.

    Raises:
        ConfigError: A base to merge into is named, and nothing is quantised.
        UnsupportedModelError: The model is sharded, or there is no 16-bit base to merge into.
    """
    kind, named = describe_quantized(base_model(given.model)), config.output.merge_base
    if kind is None:
        if named is not None:
            raise ConfigError(
                "`output.merge_base` is set, and the fine-tune's base is not quantised: leave it out."
            )
        return None
    if named is not None and config.output.output_format == "adapter":
        raise ConfigError(
            "`output.merge_base` is set, and `output.output_format: adapter` merges nothing: leave one of them out."
        )
    if sharding.collective_forward:
        raise UnsupportedModelError(
            f"The fine-tune has a {kind}, and {sharding.kind} shards it: launch with `ddp`, or in one process."
        )
    base = None
    with sharding.on_main_rank() as working:
        if working and config.output.output_format != "adapter":
            origin = given.origin
            base = open_base(named or origin.base, None if named else origin.revision)
            base.types = WrittenTypes.of_model(base.model, config.output.dtype)
    return QuantizedStep(kind, base)
