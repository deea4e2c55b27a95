"""Images to token maps. Imports torch, torchvision, timm and safetensors only.

Importing this package fills :data:`ENCODERS`; a new member is one file and one line here.
"""

from relvit_d2.encoders import swin, t2t, timm_vit, vit  # noqa: F401  (registers its members)
from relvit_d2.encoders.base import ENCODERS, Encoder, build_encoder, encoder_from_keys, map_strides

__all__ = ["ENCODERS", "Encoder", "build_encoder", "encoder_from_keys", "map_strides"]
