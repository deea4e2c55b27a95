"""Config keys of image reading."""

from math import inf

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups, check_ranges
from relvit_d2.utils.errors import UserError


def add_pixel_format_config(cfg: CfgNode) -> None:
    """Add the channels and the range of pixel values, in place; without these keys images are 8-bit RGB."""
    add_groups(cfg, "INPUT")
    cfg.INPUT.CHANNELS = 3  # number of channels of an image, 3 for RGB; also the length of PIXEL_MEAN and PIXEL_STD
    cfg.INPUT.MAX_VALUE = 0  # value that becomes 255 for images of more than 8 bits; 0: 65535, the maximum of 16 bits
    cfg.register_renamed_key("INPUT.WHITE", "INPUT.MAX_VALUE")


def add_load_size_config(cfg: CfgNode) -> None:
    """Add the maximum size of images, in place."""
    add_groups(cfg, "INPUT")
    cfg.INPUT.LOAD_SIZE = 512  # maximum of the longer side (pixels); larger images are reduced when read; 0: none


def check_pixel_format_config(cfg: CfgNode) -> None:
    """Check the keys of :func:`add_pixel_format_config`, and see :func:`check_pixel_statistics`."""
    check_ranges(cfg, {"INPUT.CHANNELS": (1, inf), "INPUT.MAX_VALUE": (0, inf)})
    check_pixel_statistics(cfg, cfg.INPUT.CHANNELS)


def check_pixel_statistics(cfg: CfgNode, channels: int) -> None:
    """Check ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` against the number of channels.

    Raises:
        UserError: there is not one mean and one positive standard deviation per channel.
    """
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != channels:
            raise UserError(
                f"MODEL.{key} has {len(cfg.MODEL[key])} values, but images have {channels} channels (INPUT.CHANNELS): "
                f"set it to {channels} values; relvit-d2 estimate-pixels computes them from your images"
            )
    if not min(cfg.MODEL.PIXEL_STD) > 0:
        raise UserError(f"MODEL.PIXEL_STD {list(cfg.MODEL.PIXEL_STD)} has values that are not positive: correct it")
