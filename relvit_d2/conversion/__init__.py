"""Weights of other projects in, ours out, and the proof that both agree."""

KINDS = ("timm", "mae", "dino", "dinov2", "swin", "t2t", "relvit", "lightly")
"""Families of weights that :mod:`relvit_d2.conversion.convert` converts; listed here for a light ``--help``."""
