"""Whether an audit of the vector allows a step: `gate.max_blind_spots`, held against before anything
is trained.
"""

from pathlib import Path
from typing import Any

from ..config.settings import SafeGeneConfig
from ..errors import ConfigError
from ..vectors.audit_file import AUDIT_FILE, AuditRecord, audit_of, read_audit
from ..vectors.safety_vector import SafetyVector
from .lineage import vector_id


_NAMED = 3  # blind spots in a message


def check_audit(config: SafeGeneConfig, vector: SafetyVector) -> dict[str, Any]:
    """What the report says of the vector's audit; nothing where the gate asks for none.

    Args:
        config: `gate.max_blind_spots`, and perhaps `gate.audit`.
        vector: The vector.

    Raises:
        ConfigError: There is no audit, or it has more blind spots than the gate allows.
        VectorError: It is damaged, or of other weights.
    """
    gate = config.gate
    if gate is None or gate.max_blind_spots is None:
        return {}
    record = _audit(config, gate.audit, vector)
    record.check_of(vector_id(vector), config.vector)
    record.check_tells()
    spots = record.blind_spots
    if len(spots) > gate.max_blind_spots:
        named = "; ".join(cell.name for cell in spots[:_NAMED])
        raise ConfigError(
            f"The audit of {config.vector} tells of blind spots ({len(spots)}: {named}) and `gate.max_blind_spots` is {gate.max_blind_spots}: "
            "cover them by `safegene extract --cover` and audit again, or raise the limit."
        )
    return {"audit": {"sha256": record.sha256, "blind_spots": len(spots)}}


def _audit(config: SafeGeneConfig, named: str | None, vector: SafetyVector) -> AuditRecord:
    if named is not None:
        return read_audit(Path(named) / AUDIT_FILE if Path(named).is_dir() else named)
    if vector.audit is None:
        raise ConfigError(
            f"`gate.max_blind_spots` is set and {config.vector} comes without an {AUDIT_FILE}: run `safegene audit`, and name what it "
            "wrote as `gate.audit`."
        )
    if config.public_key is not None:
        raise ConfigError(
            f"`gate.max_blind_spots` is set beside `public_key`, and no signature covers the {AUDIT_FILE} in {config.vector}: name an "
            "audit of your own as `gate.audit`."
        )
    return audit_of(vector.audit, f"{config.vector}/{AUDIT_FILE}")
