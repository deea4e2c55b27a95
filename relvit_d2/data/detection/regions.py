"""A training image's objects beside the regions that count as neither object nor background."""

from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances

from relvit_d2.data.detection.records import Record


class InstancesWithIgnoreRegions(Instances):
    """Detectron2's instances of an image, and regions to be ignored.

    Heads that do not read ``regions`` use them as plain instances.

    Args:
        objects: of the image.
        regions: boxes of the regions, pixels of the image as it is fed.
    """

    def __init__(self, objects: Instances, regions: Boxes) -> None:
        super().__init__(objects.image_size, **objects.get_fields())
        self._regions = regions

    @property
    def regions(self) -> Boxes:
        """The regions to be ignored."""
        return self._regions

    def to(self, *args: Any, **kwargs: Any) -> "InstancesWithIgnoreRegions":
        """See Detectron2's class."""
        return InstancesWithIgnoreRegions(super().to(*args, **kwargs), self._regions.to(*args, **kwargs))


def ignored_regions(crowds: list[Record], transforms: T.Transform, image_size: tuple[int, int]) -> Boxes:
    """Return the boxes of the crowds among an image's annotations as the image is changed, each box once.

    Args:
        crowds: annotations with ``bbox`` and ``bbox_mode``.
        transforms: what the image went through.
        image_size: height and width after that, pixels; boxes are clipped to it and dropped where nothing is left.
    """
    corners = [BoxMode.convert(crowd["bbox"], crowd["bbox_mode"], BoxMode.XYXY_ABS) for crowd in crowds]
    boxes = Boxes(torch.as_tensor(transforms.apply_box(np.unique(corners, axis=0)), dtype=torch.float32))
    boxes.clip(image_size)
    return boxes[boxes.nonempty()]
