"""Detections as NumPy arrays, which need neither torch nor Detectron2."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from relvit_d2.data.images.decode import ImageInput


class Detections(NamedTuple):
    """Detections in one image, in descending order of score; boxes are XYXY in pixels of the image."""

    boxes: np.ndarray  # (D, 4) float32
    scores: np.ndarray  # (D,) float32, 0..1
    classes: np.ndarray  # (D,) int64
    masks: np.ndarray | None  # (D, H, W) bool; None without a mask head


class AnyDetector(Protocol):
    """What detects: a model in torch (:class:`relvit_d2.detection.predictor.Detector`) or an ONNX file.

    Attributes:
        class_names: name of each class index.
        channels: number of channels of an image.
    """

    class_names: list[str]
    channels: int

    def read(self, image: ImageInput) -> np.ndarray:
        """Return an image as an array ``(H, W, channels)`` of uint8."""

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Return the detections in each image, an array as of :meth:`read`."""
