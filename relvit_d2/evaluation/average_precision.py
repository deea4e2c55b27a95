"""COCO's average precision of a list of detections, and why there is none."""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import faster_coco_eval
from pycocotools.coco import COCO

COCO_LIMIT = 100
"""Detections of an image and a class that COCO's own AP counts."""

logger = logging.getLogger(__name__)


def coco_evaluation(
    truth: COCO,
    detections: Sequence[dict[str, Any]],
    iou_type: str,
    limit: int = COCO_LIMIT,
    tell: Callable[[str], object] = logger.info,
) -> faster_coco_eval.COCOeval_faster:
    """Return the finished COCO evaluation: ``stats`` and ``eval["precision"]`` are those of pycocotools.

    faster-coco-eval computes them, many times faster. It wants whole numbers for image ids and counts an object of id
    0 as never found, so that images, in the order of their ids, and objects are numbered anew.

    Args:
        truth: the ground truth; its image ids are all text or all whole numbers.
        detections: dicts in COCO's result format (``image_id``, ``category_id``, ``score``, ``bbox`` in XYWH pixels,
            for masks ``segmentation`` in compressed RLE). One of an image that ``truth`` does not have is left out with
            a word in the log.
        iou_type: ``"bbox"`` or ``"segm"``.
        limit: detections of an image and a class that count, those of the highest scores.
        tell: takes the lines of its table.
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
    # The area of a detection with a box is the box's, which decides small, medium and large.
    left_out = "bbox" if iou_type == "segm" else "segmentation"
    found = [
        {key: value for key, value in d.items() if key != left_out} | {"image_id": number[d["image_id"]]}
        for d in detections
        if d["image_id"] in number
    ]
    if len(found) < len(detections):
        strangers = {d["image_id"] for d in detections} - number.keys()
        logger.warning(
            f"{len(detections) - len(found)} of {len(detections)} detections are left out: the ground truth has no "
            f"image {_few(strangers)}"
        )
    evaluation = faster_coco_eval.COCOeval_faster(numbered, numbered.loadRes(found), iou_type, print_function=tell)
    evaluation.params.maxDets = [1, 10, limit]
    evaluation.run()
    return evaluation


def why_no_precision(
    objects: Sequence[tuple[Hashable, Hashable]],
    detections: Sequence[tuple[Hashable, Hashable]],
    least_iou: str = "0.5",
) -> str:
    """Return the reason for an AP of 0 or NaN.

    Args:
        objects: image id and class of every object that counts.
        detections: image id and class of every detection.
        least_iou: what a detection has to reach.
    """
    if not objects:
        return "there is no ground truth, not one object that counts"
    if not detections:
        return "there are no detections at all"
    for position, what in enumerate(("an image", "a class")):
        wanted, found = ({pair[position] for pair in pairs} for pairs in (objects, detections))
        if not wanted & found:
            return (
                f"no detection is of {what} that has objects; the ids do not match "
                f"(of detections {_few(found)}, of objects {_few(wanted)})"
            )
    if not set(objects) & set(detections):
        return "no detection is of a class that its image holds"
    return f"none of the {len(detections)} detections overlaps an object of its class enough (IoU {least_iou})"


def _few(ids: set[Any]) -> str:
    """Return the first three of ``ids`` in words."""
    names = sorted(map(repr, ids))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
