"""Encoders: images to feature maps. Importing this package registers them all in :data:`ENCODERS`."""

from relvit_d2.encoders import swin, t2t, timm_vit, vit  # noqa: F401  (registers its members)
from relvit_d2.encoders.base import ENCODERS, Encoder, build_encoder, encoder_from_keys, map_strides

__all__ = ["ENCODERS", "Encoder", "build_encoder", "encoder_from_keys", "map_strides"]
