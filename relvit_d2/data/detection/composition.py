"""Geometric changes and compositions of training images with their objects; draws come from NumPy's global generator.

Objects and ignore regions that leave the image are dropped. After a change of the geometry, the box of an object with a
mask is the bounding box of its mask, as the changed box of an object without a mask can be too large.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor
from torchvision import tv_tensors as tv
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from relvit_d2.data.detection.regions import InstancesWithIgnoreRegions
from relvit_d2.utils.boxes import area, intersection

CENTRE = (0.25, 0.75)  # the common corner of a mosaic's four images, fractions of the sides
COVERED = 0.3  # maximum fraction of another box that a pasted box covers
TRIES = 10  # random positions of an object to paste; without a valid one it is not pasted
ERASED_AREA = (0.02, 0.33)  # Zhong et al., "Random Erasing Data Augmentation" (2020): fractions of the image's area
ERASED_RATIO = (0.3, 1 / 0.3)  # height over width


@dataclass(frozen=True)
class Sample:
    """A training image ``(C, H, W)`` uint8 with N objects.

    Attributes:
        boxes: ``(N, 4)`` XYXY, pixels.
        classes: ``(N,)`` int64.
        masks: ``(N, H, W)`` bool; None if masks are not trained.
        regions: ``(R, 4)`` ignore regions, XYXY, pixels.
    """

    image: tv.Image
    boxes: tv.BoundingBoxes
    classes: Tensor
    masks: tv.Mask | None
    regions: tv.BoundingBoxes

    @classmethod
    def of(cls, mapped: dict[str, Any], with_masks: bool) -> "Sample":
        """Return the sample of a mapper's output; masks must be ``BitMasks``."""
        image, instances = mapped["image"], mapped["instances"]
        size = instances.image_size
        masks = None
        if with_masks:
            known = instances.has("gt_masks")
            masks = tv.Mask(instances.gt_masks.tensor if known else torch.zeros(0, *size, dtype=torch.bool))
        regions = instances.regions.tensor if isinstance(instances, InstancesWithIgnoreRegions) else torch.zeros(0, 4)
        return cls(
            tv.Image(image), _boxes(instances.gt_boxes.tensor, size), instances.gt_classes, masks, _boxes(regions, size)
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.image.shape[1], self.image.shape[2]

    def mapped(self) -> dict[str, Any]:
        """Return ``image`` and ``instances`` as a mapper does."""
        instances = Instances(self.size)
        instances.gt_boxes = Boxes(self.boxes.as_subclass(Tensor))
        instances.gt_classes = self.classes
        if self.masks is not None and len(self.masks):
            instances.gt_masks = BitMasks(self.masks.as_subclass(Tensor))
        if len(self.regions):
            instances = InstancesWithIgnoreRegions(instances, Boxes(self.regions.as_subclass(Tensor)))
        return {"image": self.image.as_subclass(Tensor), "instances": instances}

    def moved(self, image: tv.Image, move: Callable[[Any], Any]) -> "Sample":
        """Return the sample with another image and ``move`` applied to boxes, masks and regions."""
        masks = None if self.masks is None else move(self.masks)
        moved = replace(self, image=image, boxes=move(self.boxes), masks=masks, regions=move(self.regions))
        return moved.fitted(torch.ones(len(self.boxes), dtype=torch.bool)).visible()

    def fitted(self, chosen: Tensor) -> "Sample":
        """Return the sample in which the ``chosen`` boxes, ``(N,)`` bool, are those of their masks, if it has masks."""
        if self.masks is None or not chosen.any():
            return self
        boxes = self.boxes.as_subclass(Tensor).clone()
        boxes[chosen] = BitMasks(self.masks.as_subclass(Tensor)[chosen]).get_bounding_boxes().tensor
        return replace(self, boxes=_boxes(boxes, self.size))

    def visible(self) -> "Sample":
        """Return the sample without objects and regions that have no area."""
        regions = self.regions.as_subclass(Tensor)
        kept = self.only(Boxes(self.boxes.as_subclass(Tensor)).nonempty(1e-5))
        return replace(kept, regions=_boxes(regions[Boxes(regions).nonempty(1e-5)], self.size))

    def only(self, kept: Tensor) -> "Sample":
        """Return the sample with a part of its objects, ``(N,)`` bool."""
        masks = None if self.masks is None else tv.Mask(self.masks.as_subclass(Tensor)[kept])
        boxes = _boxes(self.boxes.as_subclass(Tensor)[kept], self.size)
        return replace(self, boxes=boxes, classes=self.classes[kept], masks=masks)


def _boxes(boxes: Tensor, size: Sequence[int]) -> tv.BoundingBoxes:
    return tv.BoundingBoxes(boxes, format="XYXY", canvas_size=(size[0], size[1]))


def _joined(image: Tensor, parts: Sequence[Sample]) -> Sample:
    """Return an image with the objects and regions of parts of its size."""
    masks = [part.masks for part in parts if part.masks is not None]
    size = parts[0].size
    return Sample(
        tv.Image(image),
        _boxes(torch.cat([part.boxes.as_subclass(Tensor) for part in parts]), size),
        torch.cat([part.classes for part in parts]),
        tv.Mask(torch.cat(masks)) if masks else None,
        _boxes(torch.cat([part.regions.as_subclass(Tensor) for part in parts]), size),
    )


def window(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Return a part of the image, in pixels; what is outside of the image is black."""
    if (top, left, height, width) == (0, 0, *sample.size):
        return sample
    return sample.moved(
        F.crop(sample.image, top, left, height, width), lambda part: F.crop(part, top, left, height, width)
    )


def mosaic(samples: Sequence[Sample], height: int, width: int) -> Sample:
    """Return four images side by side, two above two, in random order (Bochkovskiy et al., "YOLOv4", 2020).

    The common corner is random. Each image fills its cell: a random, largest possible window of the cell's aspect ratio
    is resized to it.
    """
    row, column = (np.random.randint(int(side * CENTRE[0]), int(side * CENTRE[1]) + 1) for side in (height, width))
    cells = [(0, 0, row, column), (0, column, row, width - column)]
    cells += [(row, 0, height - row, column), (row, column, height - row, width - column)]
    parts = []
    for index, (top, left, down, across) in zip(np.random.permutation(4), cells, strict=True):
        part = _filling(samples[index], down, across) if down and across else None
        if part:  # tiny images have empty cells
            parts.append(window(part, -top, -left, height, width))
    image = torch.stack([part.image.as_subclass(Tensor) for part in parts]).amax(0)  # each is 0 outside of its cell
    return _joined(image, parts)


def _filling(sample: Sample, height: int, width: int) -> Sample:
    """Return a random window of the image, resized to ``height`` x ``width`` pixels."""
    rows, columns = sample.size
    down = min(rows, max(1, round(columns * height / width)))
    across = min(columns, max(1, round(rows * width / height)))
    top, left = np.random.randint(rows - down + 1), np.random.randint(columns - across + 1)
    crop = (int(top), int(left), down, across, [height, width])
    return sample.moved(F.resized_crop(sample.image, *crop), lambda part: F.resized_crop(part, *crop))


def mixup(sample: Sample, partner: Sample) -> Sample:
    """Return the image with the mean of both images where they overlap, and the objects of both.

    Zhang et al., "mixup" (2018), with equal weights as in Ge et al., "YOLOX" (2021). The partner's position is random:
    inside the image, or around it if it is larger; the size remains that of the first image.
    """
    (height, width), (down, across) = sample.size, partner.size
    top, left = (int(np.random.randint(min(0, rest), max(0, rest) + 1)) for rest in (height - down, width - across))
    other = window(partner, -top, -left, height, width)
    image = sample.image.as_subclass(Tensor).clone()
    overlap = (slice(None), slice(max(top, 0), max(top, 0) + down), slice(max(left, 0), max(left, 0) + across))
    total = image[overlap].to(torch.int16) + other.image.as_subclass(Tensor)[overlap]
    image[overlap] = ((total + 1) // 2).to(torch.uint8)
    return _joined(image, [sample, other])


def copy_paste(sample: Sample, partner: Sample) -> Sample:
    """Return the image with a random number of the partner's objects, each at a random position.

    Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation" (2021). Without masks the contents of the boxes are
    pasted. A pasted box covers at most :data:`COVERED` of any other box. Covered pixels are removed from masks.
    """
    height, width = sample.size
    partner = window(partner, 0, 0, min(height, partner.size[0]), min(width, partner.size[1]))
    image, source = sample.image.as_subclass(Tensor).clone(), partner.image.as_subclass(Tensor)
    boxes, others = sample.boxes.numpy(), partner.boxes.numpy()
    count = len(others)
    kept, covers = [], []
    for index in np.random.permutation(count)[: np.random.randint(count) + 1 if count else 0]:
        x0, y0 = np.floor(others[index, :2]).astype(int).tolist()
        x1, y1 = np.ceil(others[index, 2:]).astype(int).tolist()
        position = _free_position(boxes, x1 - x0, y1 - y0, height, width)
        if position is None:
            continue
        top, left = position
        cover = torch.zeros(height, width, dtype=torch.bool)
        shape, target = (part[..., top : top + y1 - y0, left : left + x1 - x0] for part in (cover, image))
        shape[:] = True if partner.masks is None else partner.masks.as_subclass(Tensor)[index, y0:y1, x0:x1]
        target[:] = torch.where(shape, source[:, y0:y1, x0:x1], target)
        boxes = np.concatenate([boxes, others[index : index + 1] + np.array([left - x0, top - y0] * 2, np.float32)])
        kept.append(index)
        covers.append(cover)
    if not kept:
        return sample
    pasted = Sample(
        sample.image,
        _boxes(torch.from_numpy(boxes[len(sample.boxes) :]), sample.size),
        partner.classes[kept],
        None if sample.masks is None else tv.Mask(torch.stack(covers)),
        _boxes(torch.zeros(0, 4), sample.size),
    )
    return _uncovered(_joined(image, [sample, pasted]), covers)


def _free_position(boxes: np.ndarray, across: int, down: int, height: int, width: int) -> tuple[int, int] | None:
    """Return a random top and left at which a box covers at most :data:`COVERED` of each other box; None: not found."""
    for _ in range(TRIES):
        top, left = int(np.random.randint(height - down + 1)), int(np.random.randint(width - across + 1))
        covered = intersection(boxes, np.array([left, top, left + across, top + down]))
        if (covered <= COVERED * area(boxes)).all():
            return top, left
    return None


def _uncovered(sample: Sample, covers: Sequence[Tensor]) -> Sample:
    """Remove from each mask what the objects after it cover; the last objects are those of ``covers``, (H, W) bool."""
    if sample.masks is None:
        return sample
    masks = sample.masks.as_subclass(Tensor)
    above = torch.zeros_like(covers[0])
    first = len(masks) - len(covers)
    changed = torch.zeros(len(masks), dtype=torch.bool)
    for index in range(len(masks) - 1, -1, -1):
        changed[index] = (masks[index] & above).any()
        masks[index] &= ~above
        if index >= first:
            above |= covers[index - first]
    return sample.fitted(changed).visible()


def rotate(sample: Sample, degrees: float, fill: Sequence[float]) -> Sample:
    """Return the image rotated about its centre by a random angle of at most ``degrees``; its size remains.

    Args:
        fill: value of each channel outside of the image, 0..255.
    """
    angle = float(np.random.uniform(-degrees, degrees))
    image = F.rotate(sample.image, angle, InterpolationMode.BILINEAR, fill=list(fill))
    return sample.moved(image, lambda part: F.rotate(part, angle))


def erase(sample: Sample, fill: Sequence[float]) -> Sample:
    """Return the image with a random rectangle erased, and without the objects whose boxes are inside of it.

    Zhong et al., "Random Erasing Data Augmentation" (2020), algorithm 1, with at most :data:`TRIES` rectangles.

    Args:
        fill: value of each channel in the rectangle, 0..255.
    """
    height, width = sample.size
    for _ in range(TRIES):
        pixels = height * width * np.random.uniform(*ERASED_AREA)
        ratio = np.exp(np.random.uniform(*np.log(ERASED_RATIO)))
        down, across = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
        if down < height and across < width:
            break
    else:
        return sample
    top, left = int(np.random.randint(height - down + 1)), int(np.random.randint(width - across + 1))
    color = torch.tensor(fill, dtype=torch.uint8)[:, None, None]
    boxes = sample.boxes.as_subclass(Tensor)
    inside = (boxes >= boxes.new_tensor([left, top] * 2)) & (boxes <= boxes.new_tensor([left + across, top + down] * 2))
    erased = replace(sample, image=F.erase(sample.image, top, left, down, across, color))
    return erased.only(~inside.all(1))
