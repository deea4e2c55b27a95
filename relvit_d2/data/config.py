"""Config keys of the data loader."""

from math import inf

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups, check_ranges


def add_data_config(cfg: CfgNode) -> None:
    """Add the data sets and the loader's processes to a config, in place."""
    add_groups(cfg, "DATASETS", "DATALOADER")
    cfg.DATASETS.TRAIN = ()  # names of data sets, or folders where the task takes those
    cfg.DATASETS.TEST = ()  # as TRAIN, to evaluate on; empty: no evaluation
    cfg.DATALOADER.NUM_WORKERS = 4  # processes that read images; 0: the main one does


def add_evaluation_batch_config(cfg: CfgNode) -> None:
    """Add the size of evaluation batches to a config, in place."""
    add_groups(cfg, "TEST")
    cfg.TEST.BATCH_SIZE = 1  # images of a batch in evaluation, per process


def check_data_config(cfg: CfgNode) -> None:
    """Check the number of processes.

    Raises:
        UserError: it is negative.
    """
    check_ranges(cfg, {"DATALOADER.NUM_WORKERS": (0, inf)})


def check_evaluation_batch_config(cfg: CfgNode) -> None:
    """Check the size of evaluation batches.

    Raises:
        UserError: it is less than 1.
    """
    check_ranges(cfg, {"TEST.BATCH_SIZE": (1, inf)})
