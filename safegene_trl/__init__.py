"""Reusable safety vectors for the Hugging Face training stack."""

from .callback import SafeGeneCallback
from .config import SafeGeneConfig
from .errors import SafeGeneError
from .vector import SafetyVector


__all__ = ["SafeGeneCallback", "SafeGeneConfig", "SafeGeneError", "SafetyVector"]
