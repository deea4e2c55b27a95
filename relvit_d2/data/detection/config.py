"""Config keys of detection data sets and of the mapper."""

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups


def add_custom_data_config(cfg: CfgNode) -> None:
    """Add the keys of custom data sets and missing images, in place."""
    add_groups(cfg, "DATASETS")
    # Custom data sets: NAME: {ROOT: folder}, and optionally FORMAT (else detected), SPLIT (train, val,
    # test, all), CLASSES (in the order of their ids), for COCO JSON and IMAGES in ROOT; see docs/custom_data.md
    cfg.DATASETS.CUSTOM = type(cfg)(new_allowed=True)
    cfg.DATASETS.SKIP_MISSING = False  # leave out images that are listed but missing, instead of an error


def add_mapper_config(cfg: CfgNode) -> None:
    """Add the keys of :class:`relvit_d2.data.detection.mapper.DetectionMapper` beyond Detectron2's, in place."""
    add_groups(cfg, "INPUT.LSJ")
    cfg.INPUT.FORMAT = "RGB"  # order of the channels
    cfg.INPUT.LSJ.SIZE = 0  # large-scale jitter instead of MIN_SIZE_TRAIN: side of the square crops, pixels; 0: off
    cfg.INPUT.LSJ.SCALE = [0.1, 2.0]  # images are resized to fit into the crop times a factor of this range
