"""Configs of small detectors."""

from detectron2.config import CfgNode

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
