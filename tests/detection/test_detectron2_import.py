"""Checkpoints of Detectron2's detectors: features and detections are those of its own models."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor, nn

from relvit_d2.config.config_file import override_words
from relvit_d2.conversion.detectron2_detector import adapt_checkpoint, config_keys, find_detector
from relvit_d2.detection.model import build_detector
from relvit_d2.tasks import load_config
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.errors import UserError
from tests.support.detectron2_models import vitdet

PATCH, SIDE = 16, 128


def encoder_keys(size: str = "nano", side: int = SIDE, window: int = 3, blocks: int = 2) -> dict[str, Any]:
    encoder = {"NAME": f"vitdet:{size}", "PATCH_SIZE": PATCH, "IMG_SIZE": side, "POS_EMBED": True}
    windows = {"WINDOW": window, "GLOBAL_BLOCKS": blocks, "REL_POS": True}
    return {f"MODEL.ENCODER.{name}": value for name, value in (encoder | windows).items()}


def config(tensors: dict[str, Tensor], *overrides: Any) -> CfgNode:
    found = find_detector("file", tensors)
    assert found is not None
    keys = config_keys(found) | {"MODEL.ROI_HEADS.NUM_CLASSES": found.classes, "MODEL.DEVICE": "cpu"}
    return load_config("configs/base/detection.yaml", [*override_words(keys), *map(str, overrides)])


def ours(theirs: nn.Module, *overrides: Any) -> Any:
    """Return this package's detector with the tensors of Detectron2's."""
    checkpoint = {"model": theirs.state_dict()}
    cfg = config(checkpoint["model"], *overrides)
    model = build_detector(cfg).eval()
    report = adapt_checkpoint("file", checkpoint, model.state_dict(), partial(get_key, cfg), None)
    assert "loaded" in report
    model.load_state_dict(checkpoint["model"])
    return model


def fields(instances: Instances) -> dict[str, Tensor]:
    values = {"scores": instances.scores, "classes": instances.pred_classes, "boxes": instances.pred_boxes.tensor}
    return values | ({"masks": instances.pred_masks} if instances.has("pred_masks") else {})


def check_equal(mine: Any, theirs: Any, sizes: list[tuple[int, int]], some: bool = True) -> None:
    images = [torch.randint(0, 256, (3, *size)).to(torch.uint8) for size in sizes]
    inputs = [{"image": image, "height": 2 * image.shape[1], "width": 2 * image.shape[2]} for image in images]
    with torch.no_grad():
        batches = [model.preprocess_image(inputs).tensor for model in (mine, theirs)]
        torch.testing.assert_close(*batches)
        levels = [model.backbone(batch) for model, batch in zip((mine, theirs), batches, strict=True)]
        assert levels[0].keys() == levels[1].keys()
        for name, expected in levels[1].items():
            assert ((levels[0][name] - expected).abs().max() / expected.abs().max()).item() < 1e-4, name
        found, expected = (model(inputs) for model in (mine, theirs))
    for one, other in zip(found, expected, strict=True):
        assert len(one["instances"]) or not some
        torch.testing.assert_close(fields(one["instances"]), fields(other["instances"]), rtol=1e-4, atol=1e-3)


def test_features_and_detections_are_those_of_detectron2() -> None:
    theirs = vitdet(encoder_keys())
    check_equal(ours(theirs, "MODEL.RPN.POST_NMS_TOPK_TEST", 30), theirs, [(SIDE, 90), (77, SIDE)])
