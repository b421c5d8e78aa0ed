"""What an audit is about, and all that can be refused before a model is looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..distributed.world_size import launched_processes
from ..errors import ConfigError, OutputError, VectorError
from ..vectors.audit_file import AUDIT_FILE, AuditRecord, read_audit
from ..vectors.files import CONFIG_FILE, WEIGHTS_FILE, read_files
from ..vectors.safety_vector import SafetyVector
from .compare import check_comparable
from .config import AuditConfig
from .prompts import AuditPrompts, key_of, read_items
from .variants import Coefficients, check_entry, check_not_folded, chosen_coefficients


@dataclass(frozen=True)
class PlannedAudit:
    """An audit as it is asked for.

    Attributes:
        config: How.
        vector: Of what.
        contents: The bytes of the vector's files.
        before: The earlier audit that it is compared with.
        chosen: The coefficients that somebody has named.
        aligned: The aligned model.
        model: The fine-tune; empty where the aligned model without the vector stands in.
        found: What is asked.
    """

    config: AuditConfig
    vector: SafetyVector
    contents: Mapping[str, bytes]
    before: AuditRecord | None
    chosen: Coefficients | None
    aligned: str
    model: str
    found: AuditPrompts

    @property
    def folder(self) -> Path:
        """Where it is written to."""
        return Path(self.config.output_dir)


def plan_audit(config: AuditConfig) -> PlannedAudit:
    """Reads what an audit needs but models.

    Raises:
        ConfigError: A value is missing, impossible, or contradicts another one.
        VectorError: The vector, or an earlier audit, is missing or damaged.
        CalibrationDataError: A prompt set cannot be used.
        OutputError: The folder holds another vector's audit or the earlier one.
    """
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
    _check_folder(Path(config.output_dir), config, vector, [aligned, model])
    found = read_items(config, vector)
    if before is not None:
        measure = measure_of(not model, chosen is None or chosen.uniform)
        keys = set(map(key_of, found.prompts))
        check_comparable(before, measure, config, keys)
    return PlannedAudit(config, vector, contents, before, chosen, aligned, model, found)


def measure_of(stand_in: bool, uniform: bool) -> str:
    """With all of the vector back the aligned model answers: what came back says nothing."""
    return "reach" if stand_in and uniform else "restored"


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
