"""Config keys of the data loader."""

from math import inf

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups, check_ranges
from relvit_d2.utils.errors import UserError, nearest

CACHES = ("off", "ram", "disk")


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
    # Keep decoded images, so that each is decoded once: off; ram: in /dev/shm, during the run; disk: in the user's
    # cache, for later runs too.
    cfg.DATALOADER.CACHE = "off"
    cfg.DATALOADER.CACHE_LIMIT_GB = 20.0  # maximum size; images that do not fit are decoded in every epoch


def add_evaluation_batch_config(cfg: CfgNode) -> None:
    """Add the size of evaluation batches, in place."""
    add_groups(cfg, "TEST")
    cfg.TEST.BATCH_SIZE = 1  # images per evaluation batch and process


def check_data_config(cfg: CfgNode) -> None:
    """Raise a ``UserError`` if a key of the loader has an invalid value."""
    loader = ("NUM_WORKERS", -1), ("TIMEOUT", 0), ("CACHE_LIMIT_GB", 0)
    check_ranges(cfg, {f"DATALOADER.{key}": (low, inf) for key, low in loader})
    if (mode := cfg.DATALOADER.CACHE) not in CACHES:
        raise UserError(f"DATALOADER.CACHE '{mode}' must be {', '.join(CACHES)}{nearest(str(mode), CACHES)}")


def check_evaluation_batch_config(cfg: CfgNode) -> None:
    """Raise a ``UserError`` if the size of evaluation batches is less than 1."""
    check_ranges(cfg, {"TEST.BATCH_SIZE": (1, inf)})
