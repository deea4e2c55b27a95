"""Detections as NumPy arrays, which need neither torch nor Detectron2."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from relvit_d2.data.images.decode import ImageInput, PixelFormat


class Mask(NamedTuple):
    """The mask of an object, as the encoded part of the image around it; memory does not grow with the image."""

    left: int  # column and row of the part's first pixel in the image
    top: int
    encoded: dict[str, Any]  # the part in COCO's run-length encoding; pixels outside do not belong to the object

    @classmethod
    def of(cls, whole: np.ndarray) -> "Mask":
        """Return the mask of an array ``(H, W)`` bool of the image's size."""
        rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
        if not len(rows):
            return cls.at(0, 0, np.zeros((0, 0), bool))
        part = whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return cls.at(int(columns[0]), int(rows[0]), part)

    @classmethod
    def at(cls, left: int, top: int, pixels: np.ndarray) -> "Mask":
        """Return the mask of a part ``(h, w)`` bool of the image."""
        return cls(left, top, coco_mask.encode(np.asfortranarray(pixels, dtype=np.uint8)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the part."""
        height, width = self.encoded["size"]
        return height, width

    @property
    def pixels(self) -> np.ndarray:
        """The part, ``(h, w)`` bool."""
        return coco_mask.decode(self.encoded).astype(bool)

    def whole(self, height: int, width: int) -> np.ndarray:
        """Return the mask ``(height, width)`` bool of an image of this size."""
        whole = np.zeros((height, width), bool)
        self.in_part(whole)[:] = self.pixels
        return whole

    def in_part(self, image: np.ndarray) -> np.ndarray:
        """Return the part of an array ``(H, W, ...)`` of the image's size that the mask's pixels cover, a view."""
        height, width = self.size
        return image[self.top : self.top + height, self.left : self.left + width]

    def rle(self, height: int, width: int) -> dict[str, Any]:
        """Return the mask in COCO's run-length encoding for an image of this size; ``counts`` is a text."""
        columns, rows = np.nonzero(self.pixels.T)
        indices = (columns + self.left) * height + rows + self.top
        first = np.diff(indices, prepend=-2) > 1  # of a run
        edges = np.stack((indices[first], indices[np.roll(first, -1)] + 1), axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=height * width).tolist()
        if not counts[-1]:
            counts.pop()
        encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return encoded | {"counts": encoded["counts"].decode()}


def mask_union(a: Mask, b: Mask) -> Mask:
    """Return the mask of the pixels of either mask."""
    left, top = min(a.left, b.left), min(a.top, b.top)
    right, bottom = max(m.left + m.size[1] for m in (a, b)), max(m.top + m.size[0] for m in (a, b))
    pixels = np.zeros((bottom - top, right - left), bool)
    for mask in (a, b):
        part = mask._replace(left=mask.left - left, top=mask.top - top).in_part(pixels)
        part |= mask.pixels
    return Mask.at(left, top, pixels)


def mask_iou(a: Mask, b: Mask) -> float:
    """Return the IoU of two masks of an image; 1 if both are empty."""
    union = mask_union(a, b).pixels.sum()
    common = a.pixels.sum() + b.pixels.sum() - union
    return float(common / union) if union else 1.0


class Detections(NamedTuple):
    """Detections in one image, in descending order of score; boxes are XYXY in pixels of the image."""

    boxes: np.ndarray  # (D, 4) float32
    scores: np.ndarray  # (D,) float32, 0..1
    classes: np.ndarray  # (D,) int64
    masks: list[Mask] | None  # (D,); None without a mask head

    def take(self, indices: np.ndarray) -> "Detections":
        """Return the detections of these indices."""
        masks = self.masks and [self.masks[index] for index in indices]
        return Detections(self.boxes[indices], self.scores[indices], self.classes[indices], masks)


class TrainingSizes(NamedTuple):
    """Sizes in the images that a detector was trained on, in pixels before they are resized."""

    width: int  # median of the images, or of the crops that training takes from them
    height: int
    object: int  # 95th percentile of the longer side of the boxes


class AnyDetector(Protocol):
    """What detects: a model in torch (:class:`relvit_d2.detection.predictor.Detector`) or an ONNX file.

    Attributes:
        class_names: name of each class index.
        pixels: format of the images.
        training: sizes in the training images; None if they are not known.
    """

    class_names: list[str]
    pixels: PixelFormat
    training: TrainingSizes | None

    def read(self, image: ImageInput) -> np.ndarray:
        """Return an image as an array ``(H, W, channels)`` of uint8."""

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Return the detections in each image, an array as of :meth:`read`."""
