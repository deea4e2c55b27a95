"""Matching of anchors with objects in blocks of objects."""

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor

# IoUs that are computed at once: on a CPU, they fit into the cache; other devices need fewer, larger operations, in
# arrays of 64 MiB.
BLOCK_CPU, BLOCK = 2**18, 2**24


def match_anchors(objects: Tensor, anchors: Tensor, matcher: Matcher, block: int = 0) -> tuple[Tensor, Tensor]:
    """Return what ``matcher`` returns for the IoU of all objects and anchors, bitwise identical.

    Detectron2 computes several arrays of all objects by all anchors, which takes more than a third of a training step
    of a small detector on a CPU if images have a hundred objects (docs/benchmarks.md).

    Args:
        objects: boxes ``(M, 4)`` XYXY.
        anchors: boxes ``(N, 4)`` XYXY with an area above 0; N >= 1.
        matcher: of Detectron2.
        block: number of IoUs that are computed at once; 0: suits the device.

    Returns:
        the index of the object with the highest IoU, the first of equal ones, ``(N,)`` int64, and the label of each
        anchor, ``(N,)`` int8.
    """
    block = block or (BLOCK_CPU if anchors.device.type == "cpu" else BLOCK)
    count = max(block // len(anchors), 1)
    highest = anchors.new_full((len(anchors),), -1.0)
    matches = torch.zeros_like(highest, dtype=torch.int64)
    closest = torch.zeros_like(highest, dtype=torch.bool)  # no anchor has a higher IoU with some object
    left, top, right, bottom = anchors.t().contiguous()
    area = (right - left) * (bottom - top)
    for start in range(0, len(objects), count):
        x1, y1, x2, y2 = objects[start : start + count].t()[:, :, None]
        width = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
        height = torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0)
        inter = width.mul_(height)
        iou = inter / ((x2 - x1) * (y2 - y1) + area).sub_(inter)
        if matcher.allow_low_quality_matches:
            closest |= (iou == iou.amax(1, keepdim=True)).any(0)
        values, indices = iou.max(0)
        better = values > highest
        highest = torch.where(better, values, highest)
        matches = torch.where(better, indices + start, matches)
    labels = torch.ones_like(matches, dtype=torch.int8)
    for label, low, high in zip(matcher.labels, matcher.thresholds, matcher.thresholds[1:], strict=False):
        labels[(highest >= low) & (highest < high)] = label
    labels[closest] = 1
    return matches, labels
