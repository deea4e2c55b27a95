"""Instances of a training image with ignore regions, which count as neither object nor background."""

from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances

from relvit_d2.data.detection.records import Record


class InstancesWithIgnoreRegions(Instances):
    """Detectron2's instances of an image, and the regions to ignore; other heads use it as plain instances.

    Args:
        regions: boxes of the regions, pixels of the network's input.
    """

    def __init__(self, objects: Instances, regions: Boxes) -> None:
        super().__init__(objects.image_size, **objects.get_fields())
        self._regions = regions

    @property
    def regions(self) -> Boxes:
        """The regions to ignore."""
        return self._regions

    def to(self, *args: Any, **kwargs: Any) -> "InstancesWithIgnoreRegions":
        """Return the instances and regions on another device."""
        return InstancesWithIgnoreRegions(super().to(*args, **kwargs), self._regions.to(*args, **kwargs))


def ignored_regions(crowds: list[Record], transforms: T.Transform, image_size: tuple[int, int]) -> Boxes:
    """Return the transformed boxes of crowd annotations, without duplicates.

    Args:
        crowds: annotations with ``bbox`` and ``bbox_mode``.
        transforms: the transforms of the image.
        image_size: height and width of the transformed image, pixels; boxes are clipped to it, empty ones dropped.
    """
    corners = [BoxMode.convert(crowd["bbox"], crowd["bbox_mode"], BoxMode.XYXY_ABS) for crowd in crowds]
    boxes = Boxes(torch.as_tensor(transforms.apply_box(np.unique(corners, axis=0)), dtype=torch.float32))
    boxes.clip(image_size)
    return boxes[boxes.nonempty()]
