"""Classifiers for :mod:`relvit_d2.analysis.model_cost`."""

from typing import Any

import torch
from fvcore.common.config import CfgNode

from relvit_d2.analysis.model_cost import Stages, Subject, assumption
from relvit_d2.classification.model import build_classifier
from relvit_d2.classification.run import load_data
from relvit_d2.utils.errors import UserError

UNKNOWN_CLASSES = 1000  # assumed number of classes if the data cannot be read


def classifier_subject(cfg: CfgNode) -> Subject:
    """Return the classifier of a config to measure; without data, the number of classes is assumed."""
    assumed = ""
    try:
        classes = load_data(cfg, training=True).classes
    except UserError as error:
        classes, assumed = UNKNOWN_CLASSES, f"; number of classes {assumption(cfg, error)}"
    model = build_classifier(cfg, classes)
    model.mix = None  # mixup costs nothing, and needs an even batch size
    stages: Stages = {
        "augmentation": (model.augmentation, "train"),
        "encoder": (model.network.encoder, "pooled_features"),
        "head": (model.network.head, "forward"),
    }
    if model.pretext is not None:
        stages["pretext heads"] = (model.pretext, "forward")
    side = cfg.INPUT.VIEW.SIZE

    def batches(images: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
        labels = torch.randint(classes, (images,), generator=generator)
        sizes = torch.tensor([(side, side)] * images)
        return {"images": pixels, "labels": labels, "sizes": sizes, "keys": torch.arange(images)}

    return Subject(cfg, model, stages, batches, f"classifier of {classes} classes, images of {side} x {side}{assumed}")
