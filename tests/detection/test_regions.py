"""Ignore regions: in the mapper, in both heads, and no difference without them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.detection.regions import InstancesWithIgnoreRegions, ignored_regions
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.regions import IgnoringROIHeads, RelViTRPN
from tests.support.detectors import tiny_config

REGION = [32.0, 0.0, 64.0, 64.0]  # the right half


def annotation(box: list[float], crowd: int, category: int = 1) -> dict[str, Any]:
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": crowd}


def objects(*boxes: list[float]) -> Instances:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Instances((64, 64), gt_boxes=Boxes(corners), gt_classes=torch.ones(len(boxes), dtype=torch.int64))


def targets(*boxes: list[float]) -> InstancesWithIgnoreRegions:
    return InstancesWithIgnoreRegions(objects(*boxes), Boxes(torch.tensor([REGION])))


def test_the_mapper_transforms_crowds_with_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    record: dict[str, Any] = {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "height": 64,
        "width": 128,
        "annotations": [annotation([10, 10, 40, 40], 0), *(annotation([64, 0, 128, 32], 1, c) for c in range(3))],
    }
    mapper = DetectionMapper(tiny_config("INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.RANDOM_FLIP", "none"), is_train=True)
    found = mapper(record)["instances"]
    assert isinstance(found, InstancesWithIgnoreRegions)
    assert len(found) == 1  # objects for Detectron2's heads
    assert found.regions.tensor.tolist() == [[32, 0, 64, 16]]  # once, at half the size
    moved = found.to("cpu")
    assert torch.equal(moved.regions.tensor, found.regions.tensor)
    record["annotations"] = record["annotations"][:1]
    assert type(mapper(record)["instances"]) is Instances


def test_regions_follow_flips_and_crops() -> None:
    crowd = [annotation([10, 10, 40, 30], 1), annotation([90, 10, 99, 30], 1)]
    flipped = ignored_regions(crowd, T.TransformList([T.HFlipTransform(100)]), (50, 100))
    assert sorted(flipped.tensor.tolist()) == [[1, 10, 10, 30], [60, 10, 90, 30]]
    cut = ignored_regions(crowd, T.TransformList([T.CropTransform(20, 0, 30, 20)]), (20, 30))
    assert cut.tensor.tolist() == [[0, 10, 20, 20]]


def test_anchors_inside_a_region_are_not_background() -> None:
    rpn = build_detector(tiny_config()).proposal_generator
    assert type(rpn) is RelViTRPN
    rpn.batch_size_per_image = 10000  # all are sampled
    grid = torch.cartesian_prod(torch.arange(0, 64, 4), torch.arange(0, 64, 4)).float()
    anchors = [Boxes(torch.cat([grid, grid + side], dim=1)) for side in (8, 16)]
    box = [40.0, 20.0, 52.0, 32.0]
    (plain, labels), _ = rpn.label_and_sample_anchors(anchors, [objects(box), targets(box)])
    every = Boxes.cat(anchors).tensor
    left, right = every[:, 0].clamp(32, 64), every[:, 2].clamp(32, 64)
    bottom = every[:, 3].clamp(0, 64) - every[:, 1]
    inside = (right - left) * bottom > 0.5 * (every[:, 2] - every[:, 0]) ** 2
    assert (plain[inside] == 0).any() and (plain[inside] == 1).any()
    assert not (labels[inside] == 0).any()
    assert torch.equal(labels == 1, plain == 1)  # objects inside a region are trained on
    assert torch.equal(labels[~inside], plain[~inside])
    (without,), _ = rpn.label_and_sample_anchors(anchors, [targets()])
    assert torch.equal(without == 0, ~inside)


def test_proposals_inside_a_region_are_not_background() -> None:
    heads = build_detector(tiny_config()).roi_heads
    assert type(heads) is IgnoringROIHeads
    heads.batch_size_per_image, heads.positive_fraction = 1000, 0.5
    box = [40.0, 20.0, 52.0, 32.0]
    boxes: list[list[float]] = [[0, 0, 20, 20], [26, 0, 46, 20], [20, 0, 40, 20], [40, 40, 60, 60], [40, 20, 52, 33]]
    proposals = Instances(
        (64, 64), proposal_boxes=Boxes(torch.tensor(boxes)), objectness_logits=torch.zeros(len(boxes))
    )
    with EventStorage():
        plain, ignoring, empty = heads.label_and_sample_proposals(
            [proposals] * 3, [objects(box), targets(box), targets()]
        )

    def background(image: Instances) -> list[list[float]]:
        return sorted(image.proposal_boxes.tensor[image.gt_classes == heads.num_classes].tolist())

    assert background(plain) == sorted(boxes[:4])
    assert background(ignoring) == sorted([boxes[0], boxes[2]])  # 70 % inside is, 40 % is not
    assert background(empty) == sorted([boxes[0], boxes[2]])
    assert sorted(ignoring.proposal_boxes.tensor[ignoring.gt_classes == 1].tolist()) == sorted([boxes[4], box])


@pytest.mark.parametrize("regions", [False, True])
def test_images_without_regions_are_labelled_like_detectron2(regions: bool) -> None:
    """The same random draws from the same seed, also next to an image with regions."""
    model = build_detector(tiny_config())
    rpn, heads = model.proposal_generator, model.roi_heads
    rng = np.random.default_rng(0)
    corner = torch.from_numpy(rng.uniform(0, 50, (300, 2)))
    boxes = Boxes(torch.cat([corner, corner + torch.from_numpy(rng.uniform(4, 14, (300, 2)))], dim=1).float())
    proposals = Instances((64, 64), proposal_boxes=boxes, objectness_logits=torch.zeros(300))
    images: list[Instances] = [objects([10.0, 10, 20, 22]), objects([30.0, 30, 44, 44], [1.0, 1, 9, 9])]
    extra = [targets([1.0, 1, 9, 9])] if regions else []
    torch.manual_seed(0)
    ours, _ = rpn.label_and_sample_anchors([boxes], images + extra)
    torch.manual_seed(0)
    theirs, _ = RPN.label_and_sample_anchors(rpn, [boxes], images)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
    with EventStorage():
        torch.manual_seed(0)
        ours = heads.label_and_sample_proposals([proposals] * (2 + len(extra)), images + extra)
        torch.manual_seed(0)
        theirs = StandardROIHeads.label_and_sample_proposals(heads, [proposals] * 2, images)
    for a, b in zip(ours, theirs, strict=False):
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.gt_classes, b.gt_classes)
