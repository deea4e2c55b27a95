"""Config keys of the encoders."""

from math import inf
from typing import Any

from relvit_d2.utils.config_keys import add_groups, check_ranges


def add_encoder_config(cfg: Any) -> None:
    """Add the keys of :func:`relvit_d2.encoders.encoder_from_keys` to a CfgNode, in place."""
    add_groups(cfg, "MODEL.ENCODER")
    cfg.MODEL.ENCODER.NAME = "vit_small"  # a name in relvit_d2.encoders.ENCODERS, or timm:NAME
    cfg.MODEL.ENCODER.PATCH_SIZE = 16  # side of a patch in pixels; 4 in a Swin
    cfg.MODEL.ENCODER.IMG_SIZE = 224  # side in pixels of the image whose grid the position embedding is stored for
    cfg.MODEL.ENCODER.POS_EMBED = True  # position embedding; off in the method's pre-training, which predicts positions
    cfg.MODEL.ENCODER.DROP_PATH = 0.0  # stochastic depth rate of the last block, 0..1
    cfg.MODEL.ENCODER.DROPOUT = 0.0  # dropout rate, 0..1
    cfg.MODEL.ENCODER.WINDOW = 0  # ViT: side in patches of the attention windows; 0: global attention everywhere
    cfg.MODEL.ENCODER.GLOBAL_BLOCKS = 4  # with WINDOW: blocks with global attention, evenly spaced up to the last
    cfg.MODEL.ENCODER.REL_POS = False  # ViT: decomposed relative positions in every block, as in ViTDet
    cfg.MODEL.ACTIVATION_CHECKPOINT = False  # recompute the encoder's blocks in the backward pass to save memory
    cfg.MODEL.COMPILE = False  # run the encoder through torch.compile, which needs a C++ compiler on a CPU
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]  # mean of each channel; the default is ImageNet's, RGB
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]  # standard deviation of each channel; the default is ImageNet's, RGB
    cfg.register_renamed_key("MODEL.CHECKPOINT", "MODEL.ACTIVATION_CHECKPOINT")


def check_encoder_config(cfg: Any) -> None:
    """Raise a :class:`UserError` if a value is out of range."""
    sides = dict.fromkeys(("MODEL.ENCODER.PATCH_SIZE", "MODEL.ENCODER.IMG_SIZE"), (1, inf))
    check_ranges(cfg, sides | dict.fromkeys(("MODEL.ENCODER.DROP_PATH", "MODEL.ENCODER.DROPOUT"), (0, 1)))
