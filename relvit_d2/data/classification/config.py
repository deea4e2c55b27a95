"""Config keys of classification data sets."""

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups


def add_class_set_config(cfg: CfgNode) -> None:
    """Add the keys of classification data sets, in place."""
    add_groups(cfg, "DATASETS")
    cfg.DATASETS.DOWNLOAD = False  # download missing classification sets that torchvision supports
    # text file with ImageNet-100's classes (folders of ImageNet), one per line; "": those of CMC
    cfg.DATASETS.SYNSETS = ""
