"""Config keys of the data loader."""

from math import inf

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups, check_ranges


def add_data_config(cfg: CfgNode) -> None:
    """Add the keys of data sets and loader processes, in place."""
    add_groups(cfg, "DATASETS", "DATALOADER")
    cfg.DATASETS.TRAIN = ()  # names of data sets, or folders if the task accepts them
    cfg.DATASETS.TEST = ()  # evaluation data sets, as TRAIN; empty: no evaluation
    cfg.DATASETS.SKIP_UNREADABLE = True  # leave out or replace images that cannot be read, instead of an error
    cfg.DATASETS.HASH_CONTENTS = False  # --resume compares contents of the images, not times; reads all at each start
    # processes that read images; 0: the main process does; -1: as many as suit the cores, at most 8
    cfg.DATALOADER.NUM_WORKERS = -1
    cfg.DATALOADER.TIMEOUT = 600  # seconds without a batch after which such a process counts as hanging; 0: no limit


def add_evaluation_batch_config(cfg: CfgNode) -> None:
    """Add the size of evaluation batches, in place."""
    add_groups(cfg, "TEST")
    cfg.TEST.BATCH_SIZE = 1  # images per evaluation batch and process


def check_data_config(cfg: CfgNode) -> None:
    """Raise a ``UserError`` if the number of processes or the time-out is too small."""
    check_ranges(cfg, {"DATALOADER.NUM_WORKERS": (-1, inf), "DATALOADER.TIMEOUT": (0, inf)})


def check_evaluation_batch_config(cfg: CfgNode) -> None:
    """Raise a ``UserError`` if the size of evaluation batches is less than 1."""
    check_ranges(cfg, {"TEST.BATCH_SIZE": (1, inf)})
