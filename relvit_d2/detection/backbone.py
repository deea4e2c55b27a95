"""An encoder and a pyramid as a Detectron2 backbone."""

import math

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from fvcore.common.config import CfgNode
from torch import Tensor

from relvit_d2.encoders import Encoder, encoder_from_keys
from relvit_d2.errors import UserError


class EncoderBackbone(Backbone):
    """An encoder's maps under Detectron2's backbone contract."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map normalised images ``(B, 3, H, W)`` to the encoder's maps."""
        return self.encoder(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        strides, channels = self.encoder.strides, self.encoder.channels
        return {name: ShapeSpec(channels=channels[name], stride=strides[name]) for name in strides}


class EncoderPyramid(SimpleFeaturePyramid):
    """The simple feature pyramid of "Exploring Plain Vision Transformer Backbones" over an encoder's last map.

    Detectron2's class asks for padding under a misspelt key, so that nothing is padded and the right and bottom
    rim of an image whose sides are no multiples of the coarsest stride is never seen
    (``modeling/backbone/vit.py:473`` against ``structures/image_list.py:97``). Here the padding is real.
    """

    @property
    def size_divisibility(self) -> int:
        """Sides of the padded batch are multiples of this many pixels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """See Detectron2's :class:`Backbone`."""
        return {"size_divisibility": self._size_divisibility}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images ``(B, 3, H, W)`` to the levels, in float32: Detectron2's RoIAlign takes boxes in their number
        format, and bfloat16 has no pixel's accuracy beyond 256."""
        return {name: level.float() for name, level in super().forward(x).items()}

    @property
    def encoder(self) -> Encoder:
        """The encoder below the pyramid."""
        return self.net.encoder


@BACKBONE_REGISTRY.register()
def build_encoder_pyramid_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EncoderPyramid:
    """Build the backbone from the keys ``MODEL.ENCODER`` and ``MODEL.PYRAMID``.

    Levels are named by their stride as in Detectron2's pyramids: ``p2`` has stride 4, ``p6`` stride 64.

    Raises:
        UserError: if the pyramid asks for a stride that the simple pyramid cannot make of the encoder's, or
            the heads ask for a level that it does not have.
    """
    encoder = encoder_from_keys(cfg.MODEL)
    keys = cfg.MODEL.PYRAMID
    own = encoder.strides[encoder.last]
    scales = [own / stride for stride in keys.STRIDES]
    steps = [math.log2(b / a) for a, b in zip(keys.STRIDES, keys.STRIDES[1:], strict=False)]
    powers = all(stride & (stride - 1) == 0 for stride in keys.STRIDES)
    if not scales or not powers or not set(scales) <= {4.0, 2.0, 1.0, 0.5} or any(step != 1 for step in steps):
        raise UserError(
            f"MODEL.PYRAMID.STRIDES {list(keys.STRIDES)} do not fit an encoder of stride {own}: powers of two, each "
            f"twice the one before, from {max(own // 4, 1)} at the finest to {own * 2} at the coarsest"
        )
    top = None
    if keys.TOP_BLOCK:
        top = LastLevelMaxPool()
        top.in_feature = f"p{int(math.log2(keys.STRIDES[-1]))}"
    backbone = EncoderPyramid(EncoderBackbone(encoder), encoder.last, keys.OUT_CHANNELS, scales, top, keys.NORM)
    levels = list(backbone.output_shape())
    for key, wanted in (
        ("MODEL.RPN.IN_FEATURES", cfg.MODEL.RPN.IN_FEATURES),
        ("MODEL.ROI_HEADS.IN_FEATURES", cfg.MODEL.ROI_HEADS.IN_FEATURES),
    ):
        if missing := set(wanted) - set(levels):
            raise UserError(f"{key} names {sorted(missing)}, but MODEL.PYRAMID has the levels {levels}")
    return backbone
