"""Configs of small detectors."""

import json
from pathlib import Path

import torch
from detectron2.config import CfgNode

from relvit_d2.detection.model import build_detector
from relvit_d2.encoders import build_encoder
from relvit_d2.tasks import load_config


def tiny_config(*overrides: object) -> CfgNode:
    cfg = load_config("configs/demo/streets.yaml", [])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 10, *overrides])
    return cfg


def fitting(name: str, scales: tuple[float, ...]) -> list[object]:
    """Keys of the encoder ``name`` and of a pyramid with levels of these scales relative to its last map."""
    encoder = build_encoder(name)
    strides = [int(encoder.strides[encoder.last] / scale) for scale in scales]
    levels = [f"p{stride.bit_length() - 1}" for stride in strides]
    keys = ["MODEL.ENCODER.NAME", name, "MODEL.ENCODER.PATCH_SIZE", encoder.arguments["patch_size"]]
    return [
        *keys,
        "MODEL.PYRAMID.NAME",
        "simple",
        "MODEL.PYRAMID.STRIDES",
        strides,
        "MODEL.RPN.IN_FEATURES",
        levels,
        "MODEL.ROI_HEADS.IN_FEATURES",
        levels,
    ]


def write_run(folder: Path, cfg: CfgNode, spread: float = 0.1) -> Path:
    """Write the run of an untrained detector whose heads give detections of any score; return its folder.

    Args:
        folder: folder to create.
        cfg: the config; the run has as many classes.
        spread: standard deviation of the heads' last layers.
    """
    torch.manual_seed(0)
    model = build_detector(cfg)
    rpn, box = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
    for layer in (rpn.objectness_logits, rpn.anchor_deltas, box.cls_score):
        torch.nn.init.normal_(layer.weight, std=spread)
    if cfg.MODEL.MASK_ON:
        torch.nn.init.normal_(model.roi_heads.mask_head.predictor.weight, std=spread)
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "classes.json").write_text(json.dumps([f"class {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]))
    return folder
