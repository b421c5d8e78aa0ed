"""Reusable safety vectors for the Hugging Face training stack."""

from .callback import SafeGeneCallback
from .config import SafeGeneConfig
from .errors import SafeGeneError
from .gate import GateConfig
from .vector import SafetyVector


__all__ = ["GateConfig", "SafeGeneCallback", "SafeGeneConfig", "SafeGeneError", "SafetyVector"]
