"""Minimum scores of detections by class; needs neither torch nor Detectron2."""

from collections.abc import Sequence

import numpy as np

from relvit_d2.data.images.decode import ImageInput
from relvit_d2.detection.detections import AnyDetector, Detections
from relvit_d2.utils.errors import UserError, nearest

DEFAULT = 0.5  # minimum score of a class, unless another one is given


def parse_thresholds(words: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Return the minimum score of most classes, and that of each class that is named.

    Args:
        words: ``SCORE`` for most classes, at most once, and ``CLASS=SCORE``.

    Raises:
        UserError: a score is not a number in 0..1, or is given twice.
    """
    scores: dict[str, float] = {}
    for word in words:
        name, _, text = word.rpartition("=")
        try:
            score = float(text)
        except ValueError:
            score = -1.0
        if not 0 <= score <= 1:
            raise UserError(f"--threshold {word}: give 0 to 1, for a single class CLASS=SCORE")
        if name in scores:
            raise UserError(f"--threshold {' '.join(words)}: give one score for {name or 'all other classes'}")
        scores[name] = score
    return scores.pop("", DEFAULT), scores


class ClassThresholds:
    """A detector with a minimum score for each class.

    Attributes:
        class_names, pixels, training: see :class:`relvit_d2.detection.detections.AnyDetector`.
        thresholds: ``(classes,)`` float32, minimum scores, 0..1.

    Args:
        detector: returns detections from the lowest of the minimum scores on.
        threshold: minimum score of the classes that ``by_class`` does not name.
        by_class: minimum score by the name of the class.

    Raises:
        UserError: the detector does not have a class.
    """

    def __init__(self, detector: AnyDetector, threshold: float, by_class: dict[str, float]) -> None:
        self.class_names, self.pixels, self.training = detector.class_names, detector.pixels, detector.training
        for name in by_class:
            if name not in self.class_names:
                raise UserError(
                    f"--threshold names the class '{name}', which is not one of {', '.join(self.class_names)}: "
                    f"correct it{nearest(name, self.class_names)}"
                )
        self.thresholds = np.array([by_class.get(name, threshold) for name in self.class_names], dtype=np.float32)
        self._detector = detector

    def read(self, image: ImageInput) -> np.ndarray:
        """Return an image as an array ``(H, W, channels)`` of uint8."""
        return self._detector.read(image)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Return the detections in each image, an array as of :meth:`read`."""
        return [self._kept(found) for found in self._detector.detect(images)]

    def _kept(self, found: Detections) -> Detections:
        return found.take(np.flatnonzero(found.scores >= self.thresholds[found.classes]))
