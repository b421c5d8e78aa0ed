"""Reusable safety vectors for the Hugging Face training stack."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .auditing.audit import audit
    from .auditing.config import AuditConfig
    from .callback import SafeGeneCallback
    from .config.data import DataConfig
    from .config.gate import GateConfig
    from .config.measure import MeasureConfig
    from .config.output import OutputConfig
    from .config.search import SearchConfig
    from .config.settings import SafeGeneConfig
    from .errors import (
        CalibrationDataError,
        CheckpointError,
        ConfigError,
        FamilyError,
        MemoryShortageError,
        OutputError,
        PeerError,
        PlotError,
        RecalibrationError,
        RejectedError,
        SafeGeneError,
        SignatureError,
        UnexpectedError,
        UnsupportedModelError,
        VectorError,
    )
    from .evaluation.config import EvaluationConfig
    from .evaluation.evaluate import evaluate
    from .extraction.config import ExtractionConfig
    from .extraction.extract import extract
    from .extraction.transport.transport import steering_directions
    from .judges import Exchange, Judge, Verdict, load_judge
    from .models.residual import steered
    from .step.apply import apply
    from .vectors.combination import combine
    from .vectors.safety_vector import SafetyVector


__version__ = version("safegene-trl")
__all__ = [
    "AuditConfig",
    "CalibrationDataError",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "Exchange",
    "ExtractionConfig",
    "FamilyError",
    "GateConfig",
    "Judge",
    "MeasureConfig",
    "MemoryShortageError",
    "OutputConfig",
    "OutputError",
    "PeerError",
    "PlotError",
    "RecalibrationError",
    "RejectedError",
    "SafeGeneCallback",
    "SafeGeneConfig",
    "SafeGeneError",
    "SafetyVector",
    "SearchConfig",
    "SignatureError",
    "UnexpectedError",
    "UnsupportedModelError",
    "VectorError",
    "Verdict",
    "apply",
    "audit",
    "combine",
    "evaluate",
    "extract",
    "load_judge",
    "steered",
    "steering_directions",
]
_MODULES = {
    "AuditConfig": "auditing.config",
    "CalibrationDataError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataConfig": "config.data",
    "EvaluationConfig": "evaluation.config",
    "Exchange": "judges",
    "ExtractionConfig": "extraction.config",
    "FamilyError": "errors",
    "GateConfig": "config.gate",
    "Judge": "judges",
    "MeasureConfig": "config.measure",
    "MemoryShortageError": "errors",
    "OutputConfig": "config.output",
    "OutputError": "errors",
    "PeerError": "errors",
    "PlotError": "errors",
    "RecalibrationError": "errors",
    "RejectedError": "errors",
    "SafeGeneCallback": "callback",
    "SafeGeneConfig": "config.settings",
    "SafeGeneError": "errors",
    "SafetyVector": "vectors.safety_vector",
    "SearchConfig": "config.search",
    "SignatureError": "errors",
    "UnexpectedError": "errors",
    "UnsupportedModelError": "errors",
    "VectorError": "errors",
    "Verdict": "judges",
    "apply": "step.apply",
    "audit": "auditing.audit",
    "combine": "vectors.combination",
    "evaluate": "evaluation.evaluate",
    "extract": "extraction.extract",
    "load_judge": "judges",
    "steered": "models.residual",
    "steering_directions": "extraction.transport.transport",
}


def __getattr__(name: str) -> Any:
    """What is public, read when it is first asked for: else `safegene --help` would wait for torch
    and transformers.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
