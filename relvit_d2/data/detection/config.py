"""Config keys of detection data sets and of the mapper."""

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups, check_ranges
from relvit_d2.utils.errors import UserError

COLORS = ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE")  # keys of INPUT.AUGMENT that change pixels only


def add_custom_data_config(cfg: CfgNode) -> None:
    """Add the keys of custom data sets and missing images, in place."""
    add_groups(cfg, "DATASETS")
    # Custom data sets: NAME: {ROOT: folder}, and optionally FORMAT (else detected), SPLIT (train, val,
    # test, all), CLASSES (in the order of their ids), for COCO JSON and IMAGES in ROOT; see docs/custom_data.md
    cfg.DATASETS.CUSTOM = type(cfg)(new_allowed=True)
    cfg.DATASETS.SKIP_MISSING = False  # leave out images that are listed but missing, instead of an error


def add_mapper_config(cfg: CfgNode) -> None:
    """Add the keys of :class:`relvit_d2.data.detection.mapper.DetectionMapper` beyond Detectron2's, in place."""
    add_groups(cfg, "INPUT.LSJ", "INPUT.AUGMENT")
    cfg.INPUT.FORMAT = "RGB"  # order of the channels
    cfg.INPUT.LSJ.SIZE = 0  # large-scale jitter instead of MIN_SIZE_TRAIN: side of the square crops, pixels; 0: off
    cfg.INPUT.LSJ.SCALE = [0.1, 2.0]  # images are resized to fit into the crop times a factor of this range
    cfg.INPUT.AUGMENT.MOSAIC = 0.0  # probability of 2 x 2 images as one, resized; objects are about half as large
    cfg.INPUT.AUGMENT.COPY_PASTE = 0.0  # probability of objects pasted from another image: masks or, without, boxes
    cfg.INPUT.AUGMENT.MIXUP = 0.0  # probability of the mean with another image, with the objects of both
    cfg.INPUT.AUGMENT.ROTATION = 0.0  # maximum angle of a rotation to either side, degrees
    cfg.INPUT.AUGMENT.ERASING = 0.0  # probability of an erased rectangle of 2 to 33 % of the image
    cfg.INPUT.AUGMENT.BRIGHTNESS = 0.0  # maximum change of the brightness factor from 1, up or down
    cfg.INPUT.AUGMENT.CONTRAST = 0.0  # maximum change of the contrast factor from 1, up or down
    cfg.INPUT.AUGMENT.SATURATION = 0.0  # maximum change of the saturation factor from 1, up or down
    cfg.INPUT.AUGMENT.HUE = 0.0  # maximum shift of the hue to either side, a fraction of the colour circle; at most 0.5


def augments(cfg: CfgNode) -> bool:
    """Return whether a key of ``INPUT.AUGMENT`` is on."""
    return any(cfg.INPUT.AUGMENT.values())


def changes_objects(cfg: CfgNode) -> bool:
    """Return whether an augmentation that changes more than colours is on; masks must be bitmasks then."""
    return any(value for key, value in cfg.INPUT.AUGMENT.items() if key not in COLORS)


def check_mapper_config(cfg: CfgNode) -> None:
    """Raise a ``UserError`` if a key of ``INPUT.AUGMENT`` is out of range or needs colours that images do not have."""
    limits = {"ROTATION": 180, "HUE": 0.5}
    check_ranges(cfg, {f"INPUT.AUGMENT.{key}": (0, limits.get(key, 1)) for key in cfg.INPUT.AUGMENT})
    for key in COLORS:
        channels = (3,) if key in ("SATURATION", "HUE") else (1, 3)
        if cfg.INPUT.AUGMENT[key] and cfg.INPUT.CHANNELS not in channels:
            raise UserError(
                f"INPUT.AUGMENT.{key} needs images of {' or '.join(map(str, channels))} channels, but INPUT.CHANNELS "
                f"is {cfg.INPUT.CHANNELS}: set INPUT.AUGMENT.{key} 0"
            )
