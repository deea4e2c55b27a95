"""Analysis of a detector's detections beside AP: precision and recall, F1 score of images, confusion of classes."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from torchvision.ops import box_iou

from relvit_d2.evaluation.average_precision import COCO_LIMIT, coco_evaluation
from relvit_d2.evaluation.bootstrap import ap_interval
from relvit_d2.evaluation.coco import ground_truth_file
from relvit_d2.utils.errors import UserError

MIN_SCORE, MIN_IOU = 0.5, 0.5  # of a detection that counts in images and confusions


@dataclass
class DetectionAnalysis:
    """The detections on one data set compared with the ground truth.

    Attributes:
        classes: names of the classes.
        recall: ``(101,)`` 0, 0.01, ..., 1.
        precision: ``(classes, 101)`` at IoU 0.5 and each recall, 0..1; NaN for a class without objects.
        interval: 95 % interval of box AP, percent; None where it is not computed
            (:func:`relvit_d2.evaluation.bootstrap.ap_interval`).
        count: number of images.
        images: the images with an object or a detection, the highest F1 score first.
        confusion: ``(classes + 1, classes + 1)`` counts of true (rows) and detected class at a score of at least
            :data:`MIN_SCORE`; the last row counts detections of background, the last column missed objects.
    """

    classes: list[str]
    recall: np.ndarray
    precision: np.ndarray
    images: list["ImageResult"]
    confusion: np.ndarray
    interval: tuple[float, float] | None
    count: int


class ImageObjects(NamedTuple):
    """Objects and detections of an image; boxes are XYXY in pixels, classes are indices."""

    truth_boxes: np.ndarray  # (T, 4)
    truth_classes: np.ndarray  # (T,)
    boxes: np.ndarray  # (D, 4), the highest score first
    classes: np.ndarray  # (D,)
    scores: np.ndarray  # (D,) 0..1


class ImageResult(NamedTuple):
    """One image and the F1 score of its detections, 0..1: twice the correct ones over detections and objects."""

    path: Path
    objects: ImageObjects
    f1: float


def analyze_detections(inference: Path, name: str, limit: int = COCO_LIMIT) -> DetectionAnalysis | None:
    """Compare the box detections of a data set with its ground truth; return None where a file of them is missing.

    Args:
        inference: folder of the detections.
        name: of the data set.
        limit: see :func:`relvit_d2.evaluation.average_precision.coco_evaluation`.

    Raises:
        UserError: if the files are damaged or do not belong together.
    """
    file, truth_file, root = inference / "coco_instances_results.json", ground_truth_file(inference, name), Path()
    if not truth_file.is_file():
        metadata = MetadataCatalog.get(name)
        truth_file, root = Path(metadata.get("json_file") or ""), Path(metadata.get("image_root") or "")
    if not (file.is_file() and truth_file.is_file()):
        return None
    try:
        return _analyze(file, truth_file, root, limit)
    except (KeyError, ValueError, TypeError, AssertionError) as error:  # pycocotools asserts
        raise UserError(
            f"'{file}' or '{truth_file}' is damaged ({type(error).__name__}: {error}): evaluate again, with --eval-only"
        ) from error


def _analyze(file: Path, truth_file: Path, root: Path, limit: int) -> DetectionAnalysis:
    """Compare the detections of one file with the ground truth of another, whose images are in ``root``."""
    detections = [d for d in json.loads(file.read_text(encoding="utf-8")) if "bbox" in d]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO(str(truth_file))
        categories = truth.getCatIds()
        precision = _precision(truth, detections, limit)
        interval = ap_interval(truth, detections, limit)
    index = {category: number for number, category in enumerate(categories)}
    confusion = np.zeros((len(categories) + 1, len(categories) + 1), dtype=np.int64)
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for detection in detections:
        if detection["score"] >= MIN_SCORE:
            by_image.setdefault(detection["image_id"], []).append(detection)
    images = []
    for image in truth.loadImgs(truth.getImgIds()):
        objects = [a for a in truth.imgToAnns[image["id"]] if not a.get("iscrowd")]
        found = sorted(by_image.get(image["id"], []), key=lambda d: -d["score"])
        true_boxes, true_classes = _boxes(objects), np.array([index[a["category_id"]] for a in objects], dtype=np.int64)
        boxes, classes = _boxes(found), np.array([index[d["category_id"]] for d in found], dtype=np.int64)
        partner = match(boxes, true_boxes)
        matched = partner >= 0
        np.add.at(confusion, (true_classes[partner[matched]], classes[matched]), 1)
        confusion[-1] += np.bincount(classes[~matched], minlength=len(confusion))
        missed = np.setdiff1d(np.arange(len(objects)), partner[matched])
        confusion[:, -1] += np.bincount(true_classes[missed], minlength=len(confusion))
        if objects or found:
            correct = int((true_classes[partner[matched]] == classes[matched]).sum())
            scores = np.array([d["score"] for d in found])
            drawn = ImageObjects(true_boxes, true_classes, boxes, classes, scores)
            images.append(ImageResult(root / image["file_name"], drawn, 2 * correct / (len(objects) + len(found))))
    images.sort(key=lambda image: (-image.f1, -len(image.objects.truth_classes)))
    names = [category["name"] for category in truth.loadCats(categories)]
    return DetectionAnalysis(names, np.linspace(0, 1, 101), precision, images, confusion, interval, len(truth.imgs))


def match(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Match every detection to the unmatched object of the highest IoU, if at least :data:`MIN_IOU`, of any class.

    Args:
        boxes: ``(D, 4)`` XYXY, in the order of matching: the highest score first.
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
