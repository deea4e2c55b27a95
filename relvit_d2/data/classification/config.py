"""Config keys of classification data sets."""

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups


def add_class_set_config(cfg: CfgNode) -> None:
    """Add what classification data sets are read with to a config, in place."""
    add_groups(cfg, "DATASETS")
    cfg.DATASETS.DOWNLOAD = False  # download a classification set that is missing, where torchvision can
    # a text file with the folders of ImageNet that are ImageNet-100, one per line; "": those of CMC
    cfg.DATASETS.SYNSETS = ""
