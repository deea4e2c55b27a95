"""Relational Vision Transformer pre-training and detection on top of Detectron2."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_LAZY = {"add_relvit_config": "relvit_d2.detection.model", "load_detector": "relvit_d2.detection.predictor"}
__all__ = ["add_relvit_config", "load_detector"]


def __getattr__(name: str) -> Any:
    """Import a public function on first use: the encoders work without Detectron2."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'relvit_d2' has no attribute '{name}'")
