"""The detector of a config."""

from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN, build_model
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils._pytree import tree_map_only

from relvit_d2.detection import backbone  # noqa: F401  (registers the backbone)


def build_detector(cfg: CfgNode) -> GeneralizedRCNN:
    """Build Detectron2's model on ``MODEL.DEVICE``, with every score and box offset in float32.

    Under autocast the last layers return bfloat16, whose eight significant bits make neighbouring scores tie:
    that would shuffle proposals and detections and coarsen the losses.
    """
    model = build_model(cfg)
    heads = [model.proposal_generator.rpn_head, model.roi_heads.box_predictor]
    if cfg.MODEL.MASK_ON:
        heads.append(model.roi_heads.mask_head.predictor)
    for head in heads:
        head.register_forward_hook(_to_float32)
    return model


def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.float, outputs)
