"""Relational Vision Transformer pre-training and detection on top of Detectron2."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_detector"]


def __getattr__(name: str) -> Any:
    """Import ``load_detector`` when it is asked for: encoders alone need no Detectron2."""
    if name == "load_detector":
        return import_module("relvit_d2.detection.predictor").load_detector
    raise AttributeError(f"module 'relvit_d2' has no attribute '{name}'")
