"""The number of loader processes."""

from typing import Any

from detectron2.utils import comm

from relvit_d2.utils.hardware import cores


def loader_workers(cfg: Any) -> int:
    """Return the number of loader processes of this process of a run; ``cfg`` is a config of any task."""
    given: int = cfg.DATALOADER.NUM_WORKERS
    return given if given >= 0 else default_workers(cfg.MODEL.DEVICE, cores() // comm.get_local_size())


def default_workers(device: str, cores: int) -> int:
    """Return a number of loader processes, at most 8, for a process that has ``cores`` cores.

    A model on a GPU leaves the cores to the loader; a model on the CPU needs all but a quarter of them.
    """
    if device.startswith("cuda"):
        return min(cores, 8)
    return min(max(cores // 4, 1), 8) if cores > 1 else 0
