"""Reusable safety vectors for the Hugging Face training stack."""

from importlib.metadata import version

from .callback import SafeGeneCallback
from .config import SafeGeneConfig
from .errors import SafeGeneError
from .gate import GateConfig
from .vector import SafetyVector


__version__ = version("safegene-trl")
__all__ = ["GateConfig", "SafeGeneCallback", "SafeGeneConfig", "SafeGeneError", "SafetyVector"]
