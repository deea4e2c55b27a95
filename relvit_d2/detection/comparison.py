"""Comparison of the detections of two detectors."""

from collections.abc import Sequence

import numpy as np

from relvit_d2.detection.detections import AnyDetector, Detections, mask_iou
from relvit_d2.utils.boxes import iou as iou_of_boxes
from relvit_d2.utils.errors import UserError

MAX_SCORE, MAX_BOX, MIN_MASK = 1e-3, 0.5, 0.99  # allowed differences: score, pixels of a corner, IoU of masks


def compare(
    expected: AnyDetector, found: AnyDetector, images: Sequence[np.ndarray], threshold: float, limit: int
) -> str:
    """Compare the detections of two detectors one to one.

    A detection may lack its partner if its score is within the allowed difference of the threshold, or of the lowest
    score of as many detections as the limit: the other detector may have left it out.

    Args:
        expected, found: the detectors.
        images: the images, see :meth:`AnyDetector.detect`.
        threshold: minimum score of both.
        limit: maximum number of detections in an image of both.

    Returns:
        The number of detections and the largest differences, as text.

    Raises:
        UserError: detections differ by more than is allowed, or there are none.
    """
    count, score, box, mask = 0, 0.0, 0.0, 1.0
    for image in images:
        (a,), (b,) = expected.detect([image]), found.detect([image])
        pairs = matched(a, b)
        for one, partners in ((a, [i for i, _ in pairs]), (b, [j for _, j in pairs])):
            alone = np.setdiff1d(np.arange(len(one.scores)), partners)
            lowest = one.scores.min() if len(one.scores) >= limit else threshold
            if any(one.scores[alone] > lowest + MAX_SCORE):
                best = one.scores[alone].max()
                raise _difference(f"a detection of score {best:.4f} has no partner", image)
        for i, j in pairs:
            score = max(score, float(abs(a.scores[i] - b.scores[j])))
            box = max(box, float(np.abs(a.boxes[i] - b.boxes[j]).max()))
            if a.masks is not None and b.masks is not None:
                mask = min(mask, mask_iou(a.masks[i], b.masks[j]))
        count += len(pairs)
        if score > MAX_SCORE or box > MAX_BOX or mask < MIN_MASK:
            raise _difference(
                f"scores differ by {score:.1e}, boxes by {box:.2f} pixels, IoU of masks {mask:.3f}", image
            )
    if not count:
        raise UserError(
            f"the detector finds nothing in the {len(images)} images, so that nothing can be compared and nothing was "
            "written: give --images, a folder of images with objects"
        )
    masks = f", masks {1 - mask:.1e} (1 - IoU)" if a.masks is not None else ""
    return f"{count} detections, largest differences: scores {score:.1e}, boxes {box:.1e} pixels{masks}"


def _difference(what: str, image: np.ndarray) -> UserError:
    return UserError(
        f"the detections of the exported file differ from the model's in an image of {image.shape[1]} x "
        f"{image.shape[0]} pixels ({what}): nothing was written; please report this"
    )


def matched(a: Detections, b: Detections, iou: float = 0.9) -> list[tuple[int, int]]:
    """Pair detections of the same class, each at most once, those of the highest IoU first.

    Args:
        a, b: detections in the same image.
        iou: minimum IoU of a pair's boxes.

    Returns:
        Indices into ``a`` and ``b``.
    """
    overlaps = np.where(a.classes[:, None] == b.classes, iou_of_boxes(a.boxes[:, None], b.boxes), 0)
    pairs: list[tuple[int, int]] = []
    while overlaps.size and overlaps.max() >= iou:
        i, j = np.unravel_index(overlaps.argmax(), overlaps.shape)
        pairs.append((int(i), int(j)))
        overlaps[i], overlaps[:, j] = -1, -1
    return pairs
