"""Config keys of detection data sets and of the mapper."""

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups


def add_custom_data_config(cfg: CfgNode) -> None:
    """Add custom data sets and the treatment of missing images to a config, in place."""
    add_groups(cfg, "DATASETS")
    # Custom data sets: NAME: {ROOT: folder}, and optionally FORMAT (coco, voc or yolo; else detected), SPLIT
    # (train, val, test, all), CLASSES (in the order of their ids), for COCO JSON and IMAGES in ROOT;
    # see docs/custom_data.md
    cfg.DATASETS.CUSTOM = type(cfg)(new_allowed=True)
    cfg.DATASETS.SKIP_MISSING = False  # leave out images that are listed but absent, instead of refusing to start


def add_mapper_config(cfg: CfgNode) -> None:
    """Add what :class:`relvit_d2.data.detection.mapper.DetectionMapper` reads beyond Detectron2's keys, in place."""
    add_groups(cfg, "INPUT.LSJ")
    cfg.INPUT.FORMAT = "RGB"  # order of the channels
    cfg.INPUT.LSJ.SIZE = 0  # large-scale jitter in place of MIN_SIZE_TRAIN: pixels of the square crops; 0: off
    cfg.INPUT.LSJ.SCALE = [0.1, 2.0]  # images are resized to fit the crop times a factor of this range
