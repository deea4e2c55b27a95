"""Construction of the detector of a config."""

import traceback
from collections.abc import Callable
from functools import partial

import torch
from detectron2.modeling import GeneralizedRCNN, build_backbone, build_model
from fvcore.common.config import CfgNode
from torch import Tensor

from relvit_d2.detection.backbone import build_encoder_pyramid_backbone, check_levels
from relvit_d2.detection.config import add_relvit_config
from relvit_d2.detection.rcnn import RelViTRCNN
from relvit_d2.detection.regions import IGNORE_REGION_HEADS
from relvit_d2.utils.errors import UserError

__all__ = ["add_relvit_config", "build_detector"]  # importing this module registers the classes


def build_detector(cfg: CfgNode) -> GeneralizedRCNN:
    """Build Detectron2's model on ``MODEL.DEVICE``, with scores and box offsets in float32.

    Detectron2's GeneralizedRCNN, RPN and ROI heads are replaced by :class:`relvit_d2.detection.rcnn.RelViTRCNN` and the
    classes of :mod:`relvit_d2.detection.regions`.

    The last layers, which are small, run in float32 under autocast too: with the eight significant bits of bfloat16,
    many scores are equal, so that the order of proposals and detections is arbitrary.

    Raises:
        UserError: if ``MODEL.META_ARCHITECTURE`` is not GeneralizedRCNN, or Detectron2 rejects a key.
    """
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UserError(
            f"MODEL.META_ARCHITECTURE '{cfg.MODEL.META_ARCHITECTURE}' is not supported; set GeneralizedRCNN"
        )
    cfg = cfg.clone()
    cfg.defrost()
    if build_encoder_pyramid_backbone.__name__ != cfg.MODEL.BACKBONE.NAME:
        _check_other_backbone(cfg)
    cfg.MODEL.META_ARCHITECTURE = RelViTRCNN.__name__
    for part in (cfg.MODEL.PROPOSAL_GENERATOR, cfg.MODEL.ROI_HEADS):
        part.NAME = IGNORE_REGION_HEADS.get(part.NAME, part.NAME)
    try:
        model = build_model(cfg)
    except (AssertionError, ValueError) as error:  # what Detectron2 raises for invalid values
        raise _build_error("this detector", error) from error
    rpn, box = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
    last = [rpn.objectness_logits, rpn.anchor_deltas, box.cls_score, box.bbox_pred]
    if cfg.MODEL.MASK_ON:
        last.append(model.roi_heads.mask_head.predictor)
    for layer in last:
        layer.forward = partial(_in_float32, layer.forward)
    return model


def _check_other_backbone(cfg: CfgNode) -> None:
    """Check a backbone of another project: it can be built, has the levels of the heads, and is not trained jointly."""
    name = cfg.MODEL.BACKBONE.NAME
    if cfg.MODEL.RELVIT.JOINT:
        raise UserError(
            f"MODEL.RELVIT.JOINT needs an encoder, which MODEL.BACKBONE.NAME '{name}' does not have: set "
            f"{build_encoder_pyramid_backbone.__name__}, or MODEL.RELVIT.JOINT False"
        )
    try:
        levels = list(build_backbone(cfg).output_shape())
    except (AssertionError, LookupError, ValueError) as error:
        raise _build_error(f"MODEL.BACKBONE.NAME '{name}'", error) from error
    check_levels(cfg, levels, name)


def _build_error(part: str, error: Exception) -> UserError:
    reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # many assertions have no message
    return UserError(
        f"Detectron2 cannot build {part} ({type(error).__name__}: {reason}): correct the keys under MODEL; "
        "RELVIT_DEBUG=1 shows where it failed"
    )


def _in_float32(forward: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return forward(features.float())
