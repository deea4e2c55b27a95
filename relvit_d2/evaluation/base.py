"""Base class of evaluators: collects the detections of all images from all processes."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm


class ImageDetections(NamedTuple):
    """The detections of one image.

    Attributes:
        image: index of the image's id in all ids, sorted as text.
        box: (D, 4) XYXY, pixels of the original image.
        score: (D,).
        label: (D,) int64 class ids.
    """

    image: int
    box: np.ndarray
    score: np.ndarray
    label: np.ndarray


class GatheringEvaluator(DatasetEvaluator):
    """Collects detections.

    Args:
        records: Detectron2 dicts with ``image_id`` (str or int).
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        image_ids = sorted((record["image_id"] for record in records), key=str)
        self._image_index = {image_id: index for index, image_id in enumerate(image_ids)}
        self.reset()

    def reset(self) -> None:
        """Remove the detections collected so far."""
        self._detections: list[ImageDetections] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collect the ``"instances"`` of Detectron2 outputs, boxes in pixels of the original image.

        Raises:
            KeyError: an input's ``image_id`` is not among the records'.
        """
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            self._detections.append(
                ImageDetections(
                    self._image_index[image["image_id"]],
                    instances.pred_boxes.tensor.numpy().astype(np.float64),
                    instances.scores.numpy().astype(np.float64),
                    instances.pred_classes.numpy().astype(np.int64),
                )
            )

    def gather(self) -> list[ImageDetections] | None:
        """Return the detections of all processes on the main one, else None; all processes must call it."""
        comm.synchronize()
        gathered = comm.gather(self._detections, dst=0)
        return list(itertools.chain.from_iterable(gathered)) if comm.is_main_process() else None


def intersection(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the areas of the intersections of XYXY boxes, which broadcast: ``(..., 4)`` to ``(...)``."""
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    return sides.clip(min=0).prod(axis=-1)


def area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas of XYXY boxes ``(..., 4)``."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of XYXY boxes, which broadcast; 0 without intersection."""
    common = intersection(boxes, others)
    union = area(boxes) + area(others) - common
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)
