"""Detectors for :mod:`relvit_d2.analysis.model_cost`."""

from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from fvcore.common.config import CfgNode

from relvit_d2.analysis.model_cost import Stages, Subject, assumption
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import register_custom
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.run import resolve_config, training_records
from relvit_d2.utils.errors import UserError

OBJECTS = 8  # per random image
UNKNOWN_CLASSES = 80  # assumed without data


def detector_subject(cfg: CfgNode) -> Subject:
    """Return the detector of a config to measure; without data, its classes are assumed."""
    register_custom(cfg.DATASETS)
    assumed = ""
    try:
        records = training_records(cfg)
    except UserError as error:
        records, assumed = [], f"; classes {assumption(cfg, error)}"
    mask_on, named = cfg.MODEL.MASK_ON, cfg.DATASETS.TRAIN
    cfg = resolve_config(cfg, records) if named else cfg.clone()
    if assumed:
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES or UNKNOWN_CLASSES
        # Among the data sets of the catalog, only COCO has masks.
        metadata = [catalog.get_metadata(name).as_dict() for name in cfg.DATASETS.TRAIN]
        cfg.MODEL.MASK_ON = mask_on and all("thing_dataset_id_to_contiguous_id" in known for known in metadata)
    model = build_detector(cfg)
    stages: Stages = {
        "encoder": (model.backbone.encoder, "forward"),
        "pyramid": (model.backbone, "forward"),
        "proposals": (model.proposal_generator, "forward"),
        "heads": (model.roi_heads, "forward"),
    }
    keys = cfg.INPUT
    height = max(keys.MIN_SIZE_TRAIN)
    width = min(height * 4 // 3, keys.MAX_SIZE_TRAIN)
    if keys.LSJ.SIZE:
        height = width = keys.LSJ.SIZE

    def batches(images: int) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        return [_random_image(height, width, cfg, generator) for _ in range(images)]

    masks = "with" if cfg.MODEL.MASK_ON else "without"
    return Subject(cfg, model, stages, batches, f"detector {masks} masks, images of {height} x {width}{assumed}")


def _random_image(height: int, width: int, cfg: CfgNode, generator: torch.Generator) -> dict[str, Any]:
    """Return an image of noise with :data:`OBJECTS` boxes, in the form of a mapper's output."""
    size = torch.tensor([width, height])
    corners = torch.rand(OBJECTS, 2, 2, generator=generator).sort(dim=1).values * (size - 2)
    boxes = torch.cat([corners[:, 0], corners[:, 1] + 2], dim=1)
    instances = Instances((height, width), gt_boxes=Boxes(boxes))
    instances.gt_classes = torch.randint(cfg.MODEL.ROI_HEADS.NUM_CLASSES, (OBJECTS,), generator=generator)
    if cfg.MODEL.MASK_ON:
        y, x = torch.arange(height)[:, None], torch.arange(width)
        inside = [(x >= b[0]) & (x < b[2]) & (y >= b[1]) & (y < b[3]) for b in boxes]
        instances.gt_masks = BitMasks(torch.stack(inside))
    image = torch.randint(256, (len(cfg.MODEL.PIXEL_MEAN), height, width), dtype=torch.uint8, generator=generator)
    return {"image": image, "height": height, "width": width, "instances": instances}
