"""Relational Vision Transformer pre-training and detection on top of Detectron2."""

__version__ = "0.1.0"
