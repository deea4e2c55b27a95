"""A small model and its trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from torch import Tensor, nn

from relvit_d2.data.loader import Batches, EndlessOrder
from relvit_d2.detection.config import add_relvit_config
from relvit_d2.engine.trainer import Trainer
from relvit_d2.engine.weight_average import build_average


class Regression(nn.Module):
    """A regression model with dropout, so that every step draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss_square": (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()}


def config(output: Path, iterations: int) -> CfgNode:
    cfg = get_cfg()
    add_relvit_config(cfg)
    cfg.merge_from_list(["OUTPUT_DIR", str(output), "MODEL.DEVICE", "cpu", "SOLVER.PRECISION", "float32"])
    cfg.merge_from_list(
        ["SOLVER.MAX_ITER", iterations, "SOLVER.WARMUP_ITERS", min(2, iterations - 1), "SOLVER.IMS_PER_BATCH", 4]
    )
    cfg.merge_from_list(["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.CHECKPOINT_PERIOD", 5])
    return cfg


def noisy(sample: int) -> Tensor:
    return torch.from_numpy(np.random.standard_normal(4)).float() + sample


def trainer(
    output: Path,
    iterations: int,
    workers: int = 0,
    model: nn.Module | None = None,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    mapper: Callable[[int], Tensor] = noisy,
    **overrides: Any,
) -> Trainer:
    torch.manual_seed(0)
    cfg = config(output, iterations)
    cfg.merge_from_list([part for key, value in overrides.items() for part in (key.replace("__", "."), value)])

    def batches(start: int) -> Batches:
        place = comm.get_rank(), comm.get_world_size(), cfg.SOLVER.GRAD_ACCUM_STEPS
        order = EndlessOrder(10, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, start, *place)
        return Batches(range(10), mapper, torch.stack, order, cfg.SEED, workers)

    model = model or Regression()
    return Trainer(cfg, model, 10, batches, evaluate, average=build_average(cfg, model))
