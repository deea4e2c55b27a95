"""Base class of evaluators: collects the detections of all images from all processes."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
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


UNREADABLE = "unreadable_images"  # key of the number of images that were left out of the results of a test set


class ReadableEvaluators(DatasetEvaluators):
    """Evaluators of a test set whose unreadable images do not count.

    Args:
        evaluators: each has a method ``leave_out`` that takes a set of image ids.
        unreadable: returns the ids that this process could not read.

    Attributes:
        left_out: ids that no process could read, after :meth:`evaluate`.
    """

    def __init__(self, evaluators: Sequence[Any], unreadable: Callable[[], Iterable[Any]]) -> None:
        super().__init__(evaluators)
        self._unreadable = unreadable
        self.left_out: set[Any] = set()

    def evaluate(self) -> Any:
        """Compute the results of the readable images; all processes must call it."""
        self.left_out = set(itertools.chain.from_iterable(comm.all_gather(list(self._unreadable()))))
        for evaluator in self._evaluators if self.left_out else ():
            evaluator.leave_out(self.left_out)
        return super().evaluate()


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
