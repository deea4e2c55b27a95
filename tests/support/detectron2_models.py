"""Detectron2's own models, built from the lazy configs in its wheel, with random weights."""

from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Instances
from torch import Tensor, nn

from relvit_d2.detection.detectron2_import import set_swin, set_vit

COMMON = Path(detectron2.__file__).parent / "model_zoo/configs/common/models"
PATCH, SIDE = 16, 128  # of a small ViTDet, pixels
SMALL = 32  # channels of the pyramid and of the heads of small models


def lazy_model(file: str) -> Any:
    return LazyConfig.load(str(COMMON / file)).model


def set_heads(model: Any, classes: int, cascade: bool, channels: int, hidden: int, proposals: int) -> None:
    """Give a Mask R-CNN in a lazy config the heads of ViTDet, in place.

    Args:
        model: the lazy config; its box heads are those of the cascade, if there is one.
        classes: number of classes.
        cascade: whether there are three stages.
        channels: of the pyramid and the convolutions of the heads.
        hidden: channels of the fully connected layers.
        proposals: number of proposals in evaluation.
    """
    heads = model.roi_heads
    heads.num_classes = classes
    model.backbone.out_channels = channels
    model.proposal_generator.head.in_channels = channels
    model.proposal_generator.head.conv_dims = [-1, -1]
    model.proposal_generator.post_nms_topk = (proposals, proposals)
    for box in heads.box_heads if cascade else [heads.box_head]:
        box.input_shape.channels, box.conv_norm = channels, "LN"
        box.conv_dims, box.fc_dims = [channels] * 4, [hidden]
    for predictor in heads.box_predictors if cascade else [heads.box_predictor]:
        predictor.input_shape.channels = hidden
    heads.mask_head.input_shape.channels, heads.mask_head.conv_norm = channels, "LN"
    heads.mask_head.conv_dims = [channels] * 5


def detectron2_model(
    keys: dict[str, Any],
    classes: int = 7,
    cascade: bool = False,
    small: bool = True,
    by: float = 0.05,
    spread: float = 0.0,
) -> nn.Module:
    """Build a ViTDet, or an R-CNN on Swin, whose weights are random, none of them 0 or 1, in evaluation mode.

    Args:
        keys: config keys of the encoder of the same detector of this package.
        classes: number of classes.
        cascade: with the heads of Cascade R-CNN.
        small: with few channels in pyramid and heads, and few proposals; else as published.
        by: standard deviation of what is added to the initial weights.
        spread: standard deviation of the weights of the scores, without a cascade; 0: the initial one, with which no
            score of many classes is above the threshold.
    """
    torch.manual_seed(0)
    swin = not keys["MODEL.ENCODER.NAME"].startswith("vitdet:")
    model = lazy_model("mask_rcnn_fpn.py" if swin else "mask_rcnn_vitdet.py")
    if swin:
        constants = LazyConfig.load(str(COMMON.parent / "data/constants.py")).constants
        model.pixel_mean, model.pixel_std = constants.imagenet_rgb256_mean, constants.imagenet_rgb256_std
        model.input_format = "RGB"
    if cascade:
        heads = lazy_model("cascade_rcnn.py").roi_heads
        heads.mask_head = model.roi_heads.mask_head
        model.roi_heads = heads
    channels, hidden, proposals = (SMALL, 2 * SMALL, 30) if small else (256, 1024, 1000)
    (set_swin if swin else set_vit)(model.backbone, keys | {"MODEL.PYRAMID.OUT_CHANNELS": channels})
    set_heads(model, classes, cascade, channels, hidden, proposals)
    built = scattered(instantiate(model), by)
    if spread:
        built.roi_heads.box_predictor.cls_score.weight.data.normal_(std=spread)
    return built


def scattered(model: Any, by: float) -> Any:
    """Add normal noise to all parameters."""
    if next(model.parameters()).device.type != "meta":
        for value in model.parameters():
            value.data.add_(by * torch.randn_like(value))
    return model.eval()


def encoder_keys(size: str = "nano", side: int = SIDE, window: int = 3, blocks: int = 2) -> dict[str, Any]:
    """Return the keys of a ViTDet's encoder."""
    encoder = {"NAME": f"vitdet:{size}", "PATCH_SIZE": PATCH, "IMG_SIZE": side, "POS_EMBED": True}
    windows = {"WINDOW": window, "GLOBAL_BLOCKS": blocks, "REL_POS": True}
    return {f"MODEL.ENCODER.{name}": value for name, value in (encoder | windows).items()}


def fields(instances: Instances) -> dict[str, Tensor]:
    """Return the tensors of detections by name."""
    values = {"scores": instances.scores, "classes": instances.pred_classes, "boxes": instances.pred_boxes.tensor}
    return values | ({"masks": instances.pred_masks} if instances.has("pred_masks") else {})
