"""What evaluators that judge boxes themselves share: the detections of all images, from all processes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm


class Found(NamedTuple):
    """The detections of one image.

    Attributes:
        image: place of the image's id among all ids, sorted as text.
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
        """Forget the detections seen so far."""
        self._detections: list[Found] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take in the ``"instances"`` of Detectron2 outputs, boxes in pixels of the original image.

        Raises:
            KeyError: an input's ``image_id`` is not among the records'.
        """
        for image, output in zip(inputs, outputs, strict=True):
            found = output["instances"].to("cpu")
            self._detections.append(
                Found(
                    self._image_index[image["image_id"]],
                    found.pred_boxes.tensor.numpy().astype(np.float64),
                    found.scores.numpy().astype(np.float64),
                    found.pred_classes.numpy().astype(np.int64),
                )
            )

    def gather(self) -> list[Found] | None:
        """Return the detections of all processes, on the main one; all of them have to call it."""
        comm.synchronize()
        gathered = comm.gather(self._detections, dst=0)
        return [found for part in gathered for found in part] if comm.is_main_process() else None
