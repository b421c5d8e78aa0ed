"""Reusable safety vectors for the Hugging Face training stack."""

from importlib.metadata import version

from .callback import SafeGeneCallback
from .config.gate import GateConfig
from .config.settings import SafeGeneConfig
from .errors import SafeGeneError
from .vectors.safety_vector import SafetyVector


__version__ = version("safegene-trl")
__all__ = ["GateConfig", "SafeGeneCallback", "SafeGeneConfig", "SafeGeneError", "SafetyVector"]
