"""Relational Vision Transformer pre-training and detection on top of Detectron2."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_LAZY = {
    "add_relvit_config": "relvit_d2.detection.model",
    "evaluate": "relvit_d2.api",
    "load_detector": "relvit_d2.detection.predictor",
    "load_encoder": "relvit_d2.analysis.features",
    "pretrain": "relvit_d2.api",
    "train": "relvit_d2.api",
}
__all__ = ["add_relvit_config", "evaluate", "load_detector", "load_encoder", "pretrain", "train"]


def __getattr__(name: str) -> Any:
    """Import a public function on first use: the encoders work without Detectron2."""
    if name not in _LAZY:
        raise AttributeError(f"module 'relvit_d2' has no attribute '{name}'")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        from relvit_d2.utils.errors import UserError

        raise UserError("the package detectron2 is not installed: run relvit-d2 doctor --install-detectron2") from error
