"""Conversion of weights from and to other projects, with a comparison of features."""

KINDS = ("timm", "mae", "dino", "dinov2", "swin", "t2t", "relvit", "lightly")
"""Families of encoder weights that can be converted; listed here so that ``--help`` need not import torch."""
