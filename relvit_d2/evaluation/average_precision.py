"""COCO's average precision of a list of detections, and the reason for an AP of 0 or NaN."""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import faster_coco_eval
from pycocotools.coco import COCO

COCO_LIMIT = 100
"""Detections per image and class that COCO's AP evaluates."""

logger = logging.getLogger(__name__)


def coco_evaluation(
    truth: COCO,
    detections: Sequence[dict[str, Any]],
    iou_type: str,
    limit: int = COCO_LIMIT,
    print_line: Callable[[str], object] = logger.info,
) -> faster_coco_eval.COCOeval_faster:
    """Return the finished COCO evaluation: ``stats`` and ``eval["precision"]`` are those of pycocotools.

    They are computed by faster-coco-eval, which is many times faster. It requires integer image ids and never matches
    an object with the id 0; therefore images (in the order of their ids) and objects are renumbered.

    Args:
        truth: the ground truth; its image ids are all text or all integers.
        detections: dicts in COCO's result format (``image_id``, ``category_id``, ``score``, ``bbox`` in XYWH pixels,
            for masks ``segmentation`` in compressed RLE). Detections of an image that ``truth`` lacks are left out with
            a warning.
        iou_type: ``"bbox"`` or ``"segm"``.
        limit: number of detections per image and class to evaluate, in order of score.
        print_line: called with each line of the table.
    """
    number = {image_id: index for index, image_id in enumerate(sorted(truth.imgs), start=1)}
    annotations = [a for a in truth.dataset["annotations"] if a["image_id"] in number]
    numbered = faster_coco_eval.COCO(
        {
            "images": [{**image, "id": number[image_id]} for image_id, image in truth.imgs.items()],
            "categories": truth.dataset["categories"],
            "annotations": [
                {**a, "id": index, "image_id": number[a["image_id"]]} for index, a in enumerate(annotations, start=1)
            ],
        }
    )
    # If a detection has a box, its area (small, medium or large) is that of the box.
    left_out = "bbox" if iou_type == "segm" else "segmentation"
    found = [
        {key: value for key, value in d.items() if key != left_out} | {"image_id": number[d["image_id"]]}
        for d in detections
        if d["image_id"] in number
    ]
    if len(found) < len(detections):
        unknown = {d["image_id"] for d in detections} - number.keys()
        logger.warning(
            f"{len(detections) - len(found)} of {len(detections)} detections are left out: the ground truth has no "
            f"image {_few(unknown)}"
        )
    evaluation = faster_coco_eval.COCOeval_faster(
        numbered, numbered.loadRes(found), iou_type, print_function=print_line
    )
    evaluation.params.maxDets = [1, 10, limit]
    evaluation.run()
    return evaluation


def explain_zero_ap(
    objects: Sequence[tuple[Hashable, Hashable]],
    detections: Sequence[tuple[Hashable, Hashable]],
    min_iou: str = "0.5",
) -> str:
    """Return the reason for an AP of 0 or NaN.

    Args:
        objects: image id and class of every evaluated object.
        detections: image id and class of every detection.
        min_iou: the IoU that a match requires.
    """
    if not objects:
        return "there is no ground truth: no object is evaluated"
    if not detections:
        return "there are no detections"
    for position, what in enumerate(("an image", "a class")):
        expected, found = ({pair[position] for pair in pairs} for pairs in (objects, detections))
        if not expected & found:
            return (
                f"no detection is of {what} with objects: the ids do not match "
                f"(detections {_few(found)}; objects {_few(expected)})"
            )
    if not set(objects) & set(detections):
        return "no detection is of a class that its image contains"
    return f"none of the {len(detections)} detections overlaps an object of its class enough (IoU {min_iou})"


def _few(ids: set[Any]) -> str:
    """Return the first three of ``ids``, separated by commas."""
    names = sorted(map(repr, ids))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
