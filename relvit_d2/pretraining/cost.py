"""The cost of the pre-training model, for :mod:`relvit_d2.analysis.model_cost`."""

from typing import Any

import torch
from fvcore.common.config import CfgNode

from relvit_d2.analysis.model_cost import Stages, Subject
from relvit_d2.pretraining.model import build_pretraining_model


def pretraining_subject(cfg: CfgNode) -> Subject:
    """Return the pre-training model of a config and its inputs."""
    model = build_pretraining_model(cfg)
    stages: Stages = {
        "views": (model.views, "train"),
        "encoder": (model.encoder, "tokens", "forward"),
        "pretext heads": (model.task, "forward"),
    }
    side, loaded = cfg.PRETEXT.IMAGE_SIZE, cfg.INPUT.LOAD_SIZE or cfg.PRETEXT.IMAGE_SIZE
    shape = (len(cfg.MODEL.PIXEL_MEAN), loaded * 3 // 4, loaded)

    def batches(images: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (images, *shape), dtype=torch.uint8, generator=generator)
        sizes = torch.tensor([shape[1:]] * images)
        return {"images": pixels, "sizes": sizes, "keys": torch.arange(images)}

    return Subject(cfg, model, stages, batches, f"pre-training, views of {side} x {side}")
