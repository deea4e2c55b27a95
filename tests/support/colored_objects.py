"""Images whose objects are rectangles of unique colours, and the comparison of labels with them."""

from itertools import product

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors as tv

from relvit_d2.data.detection.composition import Sample

# One a class. No mixture of one of them with black is near another one.
COLORS = torch.tensor([c for c in product((0, 128, 255), repeat=3) if max(c) == 255], dtype=torch.uint8)
REGION = len(COLORS) - 1  # white: the colour of ignore regions
PER_IMAGE = 4


def boxes_of(corners: list[list[int]], size: tuple[int, int]) -> tv.BoundingBoxes:
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    return tv.BoundingBoxes(boxes, format="XYXY", canvas_size=size)


def scene(seed: int, first: int = 0, size: tuple[int, int] = (90, 120), masks: bool = True) -> Sample:
    """An image with up to four objects, rectangles of the colours from ``first`` on, and an ignore region."""
    draw = np.random.default_rng([seed, first])
    image = torch.zeros(3, *size, dtype=torch.uint8)
    corners = []
    cells = draw.permutation(list(product(range(2), range(3))))[: PER_IMAGE + 1]
    for number, (row, column) in enumerate(cells.tolist()):
        height, width = size[0] // 2, size[1] // 3
        top, left = row * height + draw.integers(2, height // 3), column * width + draw.integers(2, width // 3)
        bottom, right = (row + 1) * height - draw.integers(2, height // 3), (column + 1) * width - draw.integers(2, 9)
        color = COLORS[REGION if number == PER_IMAGE else first + number]
        image[:, top:bottom, left:right] = color[:, None, None]
        corners.append([int(left), int(top), int(right), int(bottom)])
    shapes = torch.zeros(PER_IMAGE, *size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(shapes, corners, strict=False):
        mask[top:bottom, left:right] = True
    return Sample(
        tv.Image(image),
        boxes_of(corners[:PER_IMAGE], size),
        torch.arange(first, first + PER_IMAGE),
        tv.Mask(shapes) if masks else None,
        boxes_of(corners[PER_IMAGE:], size),
    )


def bare(size: tuple[int, int], masks: bool) -> Sample:
    """A black image without objects."""
    nothing = boxes_of([], size)
    shapes = tv.Mask(torch.zeros(0, *size, dtype=torch.bool)) if masks else None
    return Sample(
        tv.Image(torch.zeros(3, *size, dtype=torch.uint8)), nothing, torch.zeros(0, dtype=torch.int64), shapes, nothing
    )


def pixels_of(image: Tensor, number: int) -> Tensor:
    """The pixels of a colour, ``(H, W)`` bool."""
    return ((image.int() - COLORS[number].int()[:, None, None]).abs() < 30).all(0)


def inside(boxes: Tensor, shape: torch.Size, margin: float) -> Tensor:
    """The pixels whose centres are inside one of the boxes, enlarged by a margin, ``(H, W)`` bool."""
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in shape), indexing="ij")
    within = torch.zeros(shape, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        within |= (x >= x0 - margin) & (x <= x1 + margin) & (y >= y0 - margin) & (y <= y1 + margin)
    return within


def grown(mask: Tensor) -> Tensor:
    return torch.nn.functional.max_pool2d(mask[None].float(), 3, 1, 1)[0].bool()


def check(sample: Sample, tight: bool = True) -> None:
    """Compare boxes and masks with the pixels of the objects' colours.

    Args:
        tight: boxes without masks are those of the pixels.
    """
    image = sample.image.as_subclass(Tensor)
    classes, boxes = sample.classes.tolist(), sample.boxes.as_subclass(Tensor)
    height, width = sample.size
    assert boxes.shape == (len(classes), 4)
    assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
    for number in range(REGION):
        found = pixels_of(image, number)
        own = [index for index, other in enumerate(classes) if other == number]
        assert not (found & ~inside(boxes[own], found.shape, 1)).any()
        if len(own) == 1 and (tight or sample.masks is not None) and found.sum() > 9:
            rows, columns = (found.any(dim).nonzero() for dim in (1, 0))
            extent = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (boxes[own[0]] - extent).abs().max() <= 1.5
        if sample.masks is not None:
            masks = sample.masks.as_subclass(Tensor)
            whole = masks[own].any(0) if own else torch.zeros_like(found)
            assert not (found & ~grown(whole)).any()
            assert (whole & ~grown(found)).sum() <= 4  # corners are mixed with the background in two directions
    if sample.masks is not None:
        assert sample.masks.shape == (len(classes), height, width)
        assert sample.masks.flatten(1).any(1).all()
    white = pixels_of(image, REGION)
    assert not (white & ~inside(sample.regions.as_subclass(Tensor), white.shape, 1)).any()
