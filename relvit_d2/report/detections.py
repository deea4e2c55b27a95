"""What a detector's detections say beside AP: precision and recall, the best and the worst images, confusions."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from torchvision.ops import box_iou

from relvit_d2.evaluation.average_precision import COCO_LIMIT, coco_evaluation
from relvit_d2.evaluation.coco import ground_truth_file
from relvit_d2.utils.errors import UserError

MIN_SCORE, MIN_IOU = 0.5, 0.5  # of a detection that counts in images and confusions


@dataclass
class Judged:
    """The detections of one data set beside its truth.

    Attributes:
        classes: names of the classes.
        recall: ``(101,)`` 0, 0.01, ..., 1.
        precision: ``(classes, 101)`` at IoU 0.5 and each recall, 0..1; NaN for a class without objects.
        images: one for each image with an object or a detection, the best first.
        confusion: ``(classes + 1, classes + 1)`` counts of true (rows) and detected class at a score of at least
            :data:`MIN_SCORE`; the last row is background that was detected, the last column are objects that were not.
    """

    classes: list[str]
    recall: np.ndarray
    precision: np.ndarray
    images: list["JudgedImage"]
    confusion: np.ndarray


@dataclass
class JudgedImage:
    """One image; boxes are XYXY pixels, classes are indices.

    Attributes:
        f1: of its detections, 0..1: twice the right ones over the detections and the objects.
    """

    path: Path
    truth_boxes: np.ndarray
    truth_classes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    f1: float


def judge(inference: Path, name: str, limit: int = COCO_LIMIT) -> Judged | None:
    """Judge the box detections of the data set ``name`` in ``inference``; None where they or the truth are missing.

    Args:
        inference: folder of the detections.
        name: of the data set.
        limit: see :func:`relvit_d2.evaluation.average_precision.coco_evaluation`.

    Raises:
        UserError: if the files are damaged or do not belong together.
    """
    found, truth_file, root = inference / "coco_instances_results.json", ground_truth_file(inference, name), Path()
    if not truth_file.is_file():
        metadata = MetadataCatalog.get(name)
        truth_file, root = Path(metadata.get("json_file") or ""), Path(metadata.get("image_root") or "")
    if not (found.is_file() and truth_file.is_file()):
        return None
    try:
        return _judged(found, truth_file, root, limit)
    except (KeyError, ValueError, TypeError, AssertionError) as error:  # pycocotools asserts
        raise UserError(
            f"'{found}' or '{truth_file}' is damaged ({type(error).__name__}: {error}): "
            "evaluate again, with --eval-only"
        ) from error


def _judged(found: Path, truth_file: Path, root: Path, limit: int) -> Judged:
    """Judge the detections of one file by the truth of another, whose images lie in ``root``."""
    detections = [d for d in json.loads(found.read_text(encoding="utf-8")) if "bbox" in d]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its progress
        truth = COCO(str(truth_file))
        categories = truth.getCatIds()
        precision = _precision(truth, detections, limit)
    index = {category: number for number, category in enumerate(categories)}
    confusion = np.zeros((len(categories) + 1, len(categories) + 1), dtype=np.int64)
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for detection in detections:
        if detection["score"] >= MIN_SCORE:
            by_image.setdefault(detection["image_id"], []).append(detection)
    images = []
    for image in truth.loadImgs(truth.getImgIds()):
        objects = [a for a in truth.imgToAnns[image["id"]] if not a.get("iscrowd")]
        mine = sorted(by_image.get(image["id"], []), key=lambda d: -d["score"])
        true_boxes, true_classes = _boxes(objects), np.array([index[a["category_id"]] for a in objects], dtype=np.int64)
        boxes, labels = _boxes(mine), np.array([index[d["category_id"]] for d in mine], dtype=np.int64)
        partner = match(boxes, true_boxes)
        hits = partner >= 0
        np.add.at(confusion, (true_classes[partner[hits]], labels[hits]), 1)
        confusion[-1] += np.bincount(labels[~hits], minlength=len(confusion))
        missed = np.setdiff1d(np.arange(len(objects)), partner[hits])
        confusion[:, -1] += np.bincount(true_classes[missed], minlength=len(confusion))
        if objects or mine:
            right = int((true_classes[partner[hits]] == labels[hits]).sum())
            f1 = 2 * right / (len(objects) + len(mine))
            scores = np.array([d["score"] for d in mine])
            images.append(JudgedImage(root / image["file_name"], true_boxes, true_classes, boxes, labels, scores, f1))
    images.sort(key=lambda image: (-image.f1, -len(image.truth_classes)))
    names = [category["name"] for category in truth.loadCats(categories)]
    return Judged(names, np.linspace(0, 1, 101), precision, images, confusion)


def match(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Give every detection the free object that it overlaps most, if by at least :data:`MIN_IOU`, whatever its class.

    Args:
        boxes: ``(D, 4)`` XYXY, the surest first, which choose first.
        truth: ``(T, 4)`` XYXY.

    Returns:
        ``(D,)`` index of the object, -1 for none.
    """
    partner = np.full(len(boxes), -1)
    if not len(boxes) or not len(truth):
        return partner
    iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(truth)).numpy()
    for row in range(len(boxes)):
        best = int(iou[row].argmax())
        if iou[row, best] >= MIN_IOU:
            partner[row] = best
            iou[:, best] = -1
    return partner


def _boxes(entries: list[dict[str, Any]]) -> np.ndarray:
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _precision(truth: COCO, detections: list[dict[str, Any]], limit: int) -> np.ndarray:
    evaluation = coco_evaluation(truth, detections, "bbox", limit, print_line=lambda _: None)
    at = np.isclose(evaluation.params.iouThrs, MIN_IOU).argmax()
    precision = evaluation.eval["precision"][at, :, :, 0, -1].T  # of all areas, with the most detections an image
    return np.where((precision < 0).all(1, keepdims=True), np.nan, precision)
