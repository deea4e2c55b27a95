"""The number of loader processes."""

import os

import pytest

from relvit_d2.tasks import load_config
from relvit_d2.utils.loader_workers import default_workers, loader_workers


def test_the_default_follows_the_cores_of_the_process_and_a_given_number_wins() -> None:
    cfg = load_config("configs/custom.yaml", ["MODEL.DEVICE", "cpu"])
    mine = os.sched_getaffinity(0)
    assert loader_workers(cfg) == default_workers("cpu", len(mine))
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert loader_workers(cfg) == 0
    finally:
        os.sched_setaffinity(0, mine)
    for given in (0, 3):
        cfg.DATALOADER.NUM_WORKERS = given
        assert loader_workers(cfg) == given


@pytest.mark.parametrize("cores", [1, 2, 4, 16, 40, 256])
def test_a_gpu_leaves_its_cores_to_the_loader_and_a_model_on_the_cpu_does_not(cores: int) -> None:
    assert default_workers("cuda:1", cores) == min(cores, 8)
    assert default_workers("cpu", cores) <= min(max(cores // 4, 1), 8) and default_workers("cpu", cores) < cores
