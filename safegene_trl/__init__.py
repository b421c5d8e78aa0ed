"""Reusable safety vectors for the Hugging Face training stack."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .callback import SafeGeneCallback
    from .config.gate import GateConfig
    from .config.groups import DataConfig, MeasureConfig, OutputConfig, SearchConfig
    from .config.settings import SafeGeneConfig
    from .errors import SafeGeneError
    from .vectors.safety_vector import SafetyVector


__version__ = version("safegene-trl")
__all__ = [
    "DataConfig",
    "GateConfig",
    "MeasureConfig",
    "OutputConfig",
    "SafeGeneCallback",
    "SafeGeneConfig",
    "SafeGeneError",
    "SafetyVector",
    "SearchConfig",
]
_MODULES = {
    "DataConfig": "config.groups",
    "GateConfig": "config.gate",
    "MeasureConfig": "config.groups",
    "OutputConfig": "config.groups",
    "SafeGeneCallback": "callback",
    "SafeGeneConfig": "config.settings",
    "SafeGeneError": "errors",
    "SafetyVector": "vectors.safety_vector",
    "SearchConfig": "config.groups",
}


def __getattr__(name: str) -> Any:
    """What is public, read when it is first asked for: else `safegene --help` would wait for torch and transformers."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
