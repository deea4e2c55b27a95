"""Detection in large images, tile by tile.

The whole image is detected in too, reduced like any image, for the objects that are larger than half a tile; smaller
ones are not taken from it, since it shows them in another size than the training images. Two detections of a class
belong to the same object if the areas in which they were found overlap, and their boxes, clipped to the common area,
agree. This holds for an object that one of the areas cuts, too.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from relvit_d2.data.images.strips import StripImage
from relvit_d2.detection.detections import AnyDetector, Detections, Mask, TrainingSizes, mask_union
from relvit_d2.utils.boxes import intersection, iou
from relvit_d2.utils.errors import UserError

AGREEMENT = 0.5  # minimum IoU of boxes of the same object, the usual threshold of non-maximum suppression
EDGE = 0.01  # of a tile's side: an object that ends so near to the edge is taken as cut by it
MIN_TILE = 32  # pixels, the largest stride of an encoder
MAX_OVERLAP = 0.8  # of a tile's side


class Tiling(NamedTuple):
    """Size of tiles and of what neighbouring tiles have in common at least, in pixels of the image."""

    width: int
    height: int
    common: int

    @classmethod
    def of(cls, text: str, overlap: float, training: TrainingSizes | None) -> "Tiling":
        """Return the tiling of ``SIZE``, ``WIDTHxHEIGHT`` or ``auto``.

        With ``auto`` tiles have the size of the training images, so that objects have the size to which the detector is
        used, and overlap by the size of large objects, but at most by half a tile.

        Args:
            text: see above, in pixels of the image.
            overlap: minimum overlap of neighbouring tiles, as a fraction of their shorter side.
            training: sizes in the training images.

        Raises:
            UserError: a value is not valid, or the training images are not known.
        """
        if not 0 <= overlap <= MAX_OVERLAP:
            raise UserError(f"an overlap of {overlap} of a tile is not possible: give 0 to {MAX_OVERLAP}")
        if text == "auto":
            if training is None:
                raise UserError(
                    "the size of the training images is not known, so that tiles cannot be chosen automatically: give "
                    "their size in pixels, such as 640"
                )
            side = max(min(training.width, training.height), MIN_TILE)
            common = min(max(round(overlap * side), training.object), side // 2)
            return cls(max(training.width, side), max(training.height, side), common)
        sides = text.split("x")
        if len(sides) not in (1, 2) or not all(side.isdecimal() for side in sides):
            raise UserError(f"tiles of '{text}' are not auto, SIZE or WIDTHxHEIGHT in pixels, such as 640 or 800x600")
        width, height = int(sides[0]), int(sides[-1])
        if min(width, height) < MIN_TILE:
            raise UserError(f"a tile of {min(width, height)} pixels is too small: give at least {MIN_TILE}")
        return cls(width, height, round(overlap * min(width, height)))


class View(NamedTuple):
    """An area of an image, XYXY in pixels, and the detections in it, with boxes in pixels of the image."""

    area: tuple[int, int, int, int]
    found: Detections


def detect_in_tiles(detector: AnyDetector, image: StripImage, tiling: Tiling, batch: int) -> Detections:
    """Return the detections in an image, with boxes and masks in pixels of the image.

    Args:
        detector: the detector.
        image: the image; if it is not larger than a tile, it is detected in as usual.
        tiling: size of the tiles.
        batch: tiles that are detected in at once.

    Raises:
        UnreadableImageError: the file is damaged.
    """
    height, width = image.overview.shape[:2]
    whole = scaled(detector.detect([image.overview])[0], image.width / width, image.height / height)
    lefts = starts(image.width, tiling.width, tiling.common)
    tops = starts(image.height, tiling.height, tiling.common)
    if len(lefts) == len(tops) == 1:
        return whole
    large = (whole.boxes[:, 2:] - whole.boxes[:, :2]).max(axis=1) > min(tiling.width, tiling.height) / 2
    views = [View((0, 0, image.width, image.height), whole.take(np.flatnonzero(large)))]
    for top, rows in zip(tops, image.strips(tops, tiling.height), strict=True):
        for first in range(0, len(lefts), batch):
            tiles = [rows[:, left : left + tiling.width] for left in lefts[first : first + batch]]
            for left, tile, found in zip(lefts[first:], tiles, detector.detect(tiles), strict=False):
                area = left, top, left + tile.shape[1], top + tile.shape[0]
                views.append(View(area, shifted(found, left, top)))
    return merge(views)


def starts(length: int, tile: int, common: int) -> list[int]:
    """Return the first pixels of as few evenly spaced tiles as cover a length; neighbours have ``common`` or more."""
    if length <= tile:
        return [0]
    count = -(-(length - common) // (tile - common))
    return [(length - tile) * index // (count - 1) for index in range(count)]


def scaled(found: Detections, across: float, down: float) -> Detections:
    """Return detections in an image that is resized by these factors."""
    if across == down == 1:
        return found
    boxes = found.boxes * np.array([across, down] * 2, np.float32)
    return found._replace(boxes=boxes, masks=found.masks and [_resized(mask, across, down) for mask in found.masks])


def _resized(mask: Mask, across: float, down: float) -> Mask:
    """Resize a mask to the nearest pixels."""
    (height, width), (left, top) = mask.size, (mask.left, mask.top)
    ends = np.array([left, left + width, top, top + height]) * [across, across, down, down]
    x0, x1, y0, y1 = ends.round(6).astype(int).tolist()
    columns = ((np.arange(x0, x1) + 0.5) / across - left).astype(int).clip(0, width - 1)
    rows = ((np.arange(y0, y1) + 0.5) / down - top).astype(int).clip(0, height - 1)
    return Mask.at(x0, y0, mask.pixels[np.ix_(rows, columns)])


def shifted(found: Detections, left: int, top: int) -> Detections:
    """Return the detections in a part of an image as detections in the image."""
    boxes = found.boxes + np.array([left, top] * 2, np.float32)
    masks = found.masks and [mask._replace(left=left + mask.left, top=top + mask.top) for mask in found.masks]
    return found._replace(boxes=boxes, masks=masks)


def merge(views: Sequence[View]) -> Detections:
    """Merge the detections of areas of an image, of which the first is the whole image.

    Of the detections of an object, the one of the highest score is kept that no area cuts. If all are cut, their union
    is kept, with the highest score.
    """
    found = [view.found for view in views]
    boxes, scores, classes = (np.concatenate(parts) for parts in list(zip(*found, strict=True))[:3])
    masks = None if found[0].masks is None else [mask for one in found for mask in one.masks or ()]
    cut = np.concatenate([_cut(view, views[0].area[2:]) for view in views])
    partners = _partners(views)
    groups: dict[int, list[int]] = {}  # detections of an object, by the first of them
    first_of: dict[int, int] = {}
    for index in np.lexsort((-scores, cut)).tolist():
        firsts = {first_of[other] for other in partners[index] if other in first_of}
        whole = [first for first in firsts if not cut[first]]
        if whole and cut[index]:
            best = max(whole, key=scores.__getitem__)
            scores[best] = max(scores[best], scores[index])
        if whole:
            continue
        groups[index] = [index, *(member for first in firsts for member in groups.pop(first))]
        first_of.update(dict.fromkeys(groups[index], index))
    joined = sorted(groups.values(), key=lambda members: -scores[members].max())
    return Detections(
        np.array([[*boxes[m, :2].min(0), *boxes[m, 2:].max(0)] for m in joined], np.float32).reshape(-1, 4),
        np.array([scores[m].max() for m in joined], np.float32),
        classes[[m[0] for m in joined]],
        None if masks is None else [reduce(mask_union, [masks[i] for i in m]) for m in joined],
    )


def _cut(view: View, size: tuple[int, int]) -> np.ndarray:
    """Return whether boxes end at an edge of the view's area that is inside the image of this width and height."""
    left, top, right, bottom = view.area
    across, down = EDGE * (right - left), EDGE * (bottom - top)
    x0, y0, x1, y1 = view.found.boxes.T
    starts_outside = ((left > 0) & (x0 < left + across)) | ((top > 0) & (y0 < top + down))
    return starts_outside | ((right < size[0]) & (x1 > right - across)) | ((bottom < size[1]) & (y1 > bottom - down))


def _partners(views: Sequence[View]) -> list[list[int]]:
    """Return for each detection those in other views that may be of the same object; indices count over all views."""
    areas = np.array([view.area for view in views], np.float64)
    first = np.cumsum([0, *(len(view.found.scores) for view in views)])
    partners: list[list[int]] = [[] for _ in range(first[-1])]
    for a, view in enumerate(views):
        for b in (a + 1 + np.flatnonzero(intersection(areas[a], areas[a + 1 :]))).tolist():
            low, high = np.maximum(areas[a, :2], areas[b, :2]), np.minimum(areas[a, 2:], areas[b, 2:])
            one, other = (views[v].found.boxes.clip(np.tile(low, 2), np.tile(high, 2)) for v in (a, b))
            same = view.found.classes[:, None] == views[b].found.classes
            for i, j in np.argwhere(same & (iou(one[:, None], other) >= AGREEMENT)) + first[[a, b]]:
                partners[i].append(j)
                partners[j].append(i)
    return partners
