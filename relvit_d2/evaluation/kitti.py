"""KITTI's average precision: easy, moderate and hard, over 40 recall points and over 11 (until 2019)."""

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode

from relvit_d2.evaluation.average_precision import explain_zero_ap
from relvit_d2.evaluation.base import GatheringEvaluator, ImageDetections
from relvit_d2.utils.boxes import area, intersection, iou

MIN_IOU = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
POINTS = 41
MEASURES = {"AP40": slice(1, None), "AP11": slice(None, None, 4)}
"""The recall points to average over: 1/40 to 1, and 0, 0.1, ..., 1."""

logger = logging.getLogger(__name__)


class Level(NamedTuple):
    """Conditions for an object to be evaluated; other objects are ignored."""

    min_height: int
    """In pixels; smaller detections are ignored too."""
    max_occluded: int
    max_truncated: float


LEVELS = {"easy": Level(40, 0, 0.15), "moderate": Level(25, 1, 0.30), "hard": Level(25, 2, 0.50)}


class _ClassView(NamedTuple):
    """An image for one class: G objects of the class or a class that resembles it, D detections of any class."""

    objects: list[dict[str, Any]]
    box: np.ndarray  # (G, 4)
    overlap: np.ndarray  # (G, D) IoU
    found: ImageDetections
    of_class: np.ndarray  # (D,) bool, whether a detection is of the class
    in_dont_care: np.ndarray  # (D,) bool, whether it is in a DontCare region


class _Case(NamedTuple):
    """An image for one class and level: D detections of the class, and small ones that may be matched."""

    overlap: np.ndarray  # (G, D) IoU
    counted: np.ndarray  # (G,) bool, whether an object is evaluated, not ignored
    low: np.ndarray  # (D,) bool, whether a detection is below the minimum height
    score: np.ndarray  # (D,)
    in_dont_care: np.ndarray  # (D,)


class KittiEvaluator(GatheringEvaluator):
    """The object detection metric of KITTI (Geiger et al., CVPR 2012) on Detectron2 records.

    It follows the official ``evaluate_object.cpp`` (a public copy: xingyizhou/CenterNet at b1b6991,
    ``src/tools/kitti_eval/evaluate_object_3d_offline.cpp``: cleanData, computeStatistics, getThresholds, eval_class):

    * An object of the class is evaluated if its height, occlusion and truncation are within the level (``LEVELS``).
      Other objects of the class, and those of a class that resembles it (Van for Car, Person_sitting for Pedestrian),
      are ignored: a detection matched to one is neither a true nor a false positive.
    * Detections below the level's minimum height are ignored, but may be matched, whatever their class. An object that
      is matched only to one of them is neither found nor missed.
    * Objects are matched in the order of the file to detections with an IoU above ``MIN_IOU``. A first pass matches
      the highest score, which gives the scores at which recall is nearest to 0, 1/40, ..., 1. A second pass, for each
      of these scores and the detections that reach it, matches the largest IoU. Unmatched detections are false
      positives unless more than ``MIN_IOU`` of their area is in one DontCare region.
    * The precision at each of the 41 points is the maximum at that recall or above, and 0 for points that are not
      reached. So n perfect detections of n objects have an AP40 of (n - 1) / 40, and of 1 from 41 objects on.

    AP40 is the benchmark's metric since October 2019 ("Disentangling Monocular 3D Object Detection", Simonelli et
    al., ICCV 2019), AP11 the one before. A class without any detection has AP 0 (the official program skips it); the
    precision of 0 hits of 0 detections is 0; a class without evaluated objects is left out of the means.
    """

    def __init__(self, dataset_name: str, records: Sequence[dict[str, Any]], class_names: Sequence[str]) -> None:
        """Store the ground truth: records of :func:`relvit_d2.data.detection.kitti.load_kitti`, crowds included.

        Of ``class_names``, those in ``MIN_IOU`` are evaluated.
        """
        super().__init__(records)
        self._dataset_name = dataset_name
        self._class_names = list(class_names)
        self._objects = [record["annotations"] for record in sorted(records, key=lambda r: str(r["image_id"]))]

    def leave_out(self, image_ids: Collection[Any]) -> None:
        """Remove the objects of images that were not evaluated."""
        for image_id in image_ids:
            self._objects[self._image_index[image_id]] = []

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the metric of all processes' detections; all processes must call it.

        Returns:
            On the main process ``{"kitti": {"AP40_easy": mean of the classes, ..., "AP40_easy-Car": ...}}`` in percent,
            for ``AP40`` and ``AP11`` and each level; NaN without evaluated objects. ``{}`` on other processes.
        """
        gathered = self.gather()
        if gathered is None:
            return {}
        nothing = ImageDetections(-1, np.empty((0, 4)), np.empty(0), np.empty(0, np.int64))
        detections = {found.image: found for found in gathered}
        names = [name for name in MIN_IOU if name in self._class_names]
        means: dict[str, float] = {}
        per_class: dict[str, float] = {}
        counts: dict[tuple[str, str], int] = {}
        most_hits = 0  # maximum over the classes of the number of moderate objects found
        expected: list[tuple[int, str]] = []  # image and class of the moderate objects
        for name in names:
            views = [self._view(name, index, detections.get(index, nothing)) for index in range(len(self._objects))]
            for level, bounds in LEVELS.items():
                cases = [_case(view, name, bounds) for view in views]
                objects = sum(int(case.counted.sum()) for case in cases)
                precision, hits = precisions(cases, MIN_IOU[name], objects)
                if level == "moderate":
                    most_hits = max(most_hits, hits)
                    expected += [
                        (image, name) for image, case in enumerate(cases) for _ in range(int(case.counted.sum()))
                    ]
                counts[name, level] = objects
                for measure, points in MEASURES.items():
                    ap = 100 * float(precision[points].mean()) if objects else math.nan
                    per_class[f"{measure}_{level}-{name}"] = ap
        for measure in MEASURES:
            for level in LEVELS:
                aps = [per_class[f"{measure}_{level}-{name}"] for name in names if counts[name, level]]
                means[f"{measure}_{level}"] = float(np.mean(aps)) if aps else math.nan
        self._report(names, means, per_class, counts)
        if not means["AP40_moderate"] > 0:
            labels = {self._class_names.index(name): name for name in names}
            found = [(d.image, labels[label]) for d in gathered for label in d.label.tolist() if label in labels]
            reason = explain_zero_ap(expected, found, ", ".join(f"{iou} for {name}" for name, iou in MIN_IOU.items()))
            if most_hits:
                reason = "no class has two objects found, and AP40 excludes the first of the 41 points"
            logger.warning("KITTI's moderate AP40 is %s: %s.", means["AP40_moderate"], reason)
        return {"kitti": means | per_class}

    def _view(self, name: str, index: int, found: ImageDetections) -> _ClassView:
        annotations = self._objects[index]
        objects = [a for a in annotations if name in (a["type"], a.get("resembles"))]
        box = _corners(objects)
        overlap = iou(box[:, None], found.box)
        regions = _corners([a for a in annotations if a["type"] == "DontCare"])
        inside = intersection(regions[:, None], found.box)
        in_dont_care: np.ndarray = np.any(inside > MIN_IOU[name] * area(found.box), axis=0)
        of_class = found.label == self._class_names.index(name)
        return _ClassView(objects, box, overlap, found, of_class, in_dont_care)

    def _report(
        self,
        names: list[str],
        means: dict[str, float],
        per_class: dict[str, float],
        counts: dict[tuple[str, str], int],
    ) -> None:
        head = "".join(f"{f'{measure} {level}':>16}" for measure in MEASURES for level in LEVELS)
        lines = [f"{'class':12}{head}   evaluated objects"]
        for name in [*names, "mean"]:
            source, end = (means, "") if name == "mean" else (per_class, f"-{name}")
            aps = "".join(f"{source[f'{measure}_{level}{end}']:16.2f}" for measure in MEASURES for level in LEVELS)
            objects = "" if name == "mean" else ", ".join(str(counts[name, level]) for level in LEVELS)
            lines.append(f"{name:12}{aps}   {objects}")
        logger.info("KITTI's AP of %s, in percent:\n%s", self._dataset_name, "\n".join(lines))


def precisions(cases: Sequence[_Case], min_iou: float, objects: int) -> tuple[np.ndarray, int]:
    """Return the precision, (41,) in [0, 1], at each recall point, and the number of objects found.

    ``objects`` is the number of evaluated objects in all images; a match must exceed ``min_iou``.
    """
    scores = [score for case in cases for score in _match_highest_score(case, min_iou)]
    thresholds = np.array(recall_thresholds(scores, objects))
    hit, false = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    for case in cases:
        case_hit, case_false = _match_largest_iou(case, min_iou, thresholds)
        hit += case_hit
        false += case_false
    precision = np.zeros(POINTS)
    precision[: len(thresholds)] = np.divide(hit, hit + false, out=np.zeros_like(hit), where=hit > 0)
    return np.maximum.accumulate(precision[::-1])[::-1], len(scores)


def recall_thresholds(scores: Sequence[float], objects: int) -> list[float]:
    """Return the scores, decreasing, at most 41, at which recall is nearest to 0, 1/40, 2/40, ...

    ``scores`` are those of the detections matched to one of the ``objects`` evaluated objects.
    """
    ordered = sorted(scores, reverse=True)
    thresholds: list[float] = []
    target = 0.0
    for index, score in enumerate(ordered):
        last = index == len(ordered) - 1
        recall, next_recall = (index + 1) / objects, (index + 2) / objects
        if last or next_recall - target >= target - recall:
            thresholds.append(score)
            target += 1 / (POINTS - 1)
    return thresholds


def _case(view: _ClassView, name: str, level: Level) -> _Case:
    counted = [
        a["type"] == name and a["occluded"] <= level.max_occluded and a["truncated"] <= level.max_truncated
        for a in view.objects
    ]
    high = view.box[:, 3] - view.box[:, 1] >= level.min_height
    box, score = view.found.box, view.found.score
    low = box[:, 3] - box[:, 1] < level.min_height
    kept = np.flatnonzero(np.where(low, (view.overlap > MIN_IOU[name]).any(axis=0), view.of_class))
    return _Case(
        view.overlap[:, kept], np.array(counted, dtype=bool) & high, low[kept], score[kept], view.in_dont_care[kept]
    )


def _match_highest_score(case: _Case, min_iou: float) -> list[float]:
    """Return the scores of the detections matched to evaluated objects, if each object takes the highest score."""
    scores = []
    free = np.ones(len(case.score), dtype=bool)
    for overlap, counted in zip(case.overlap, case.counted, strict=True):
        near = np.flatnonzero(free & (overlap > min_iou))
        if len(near):
            best = near[case.score[near].argmax()]
            free[best] = False
            if counted and not case.low[best]:
                scores.append(float(case.score[best]))
    return scores


def _match_largest_iou(case: _Case, min_iou: float, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of true and false positives, (T,) each, for each of T score thresholds."""
    free = case.score >= thresholds[:, None]
    hit = np.zeros(len(thresholds))
    for overlap, counted in zip(case.overlap, case.counted, strict=True):
        near = free & (overlap > min_iou)
        rows = np.flatnonzero(near.any(axis=1))
        if not len(rows):
            continue
        full = near[rows] & ~case.low
        found = full.any(axis=1)
        # The largest IoU; a small detection, the first one, only if there is no other.
        choice = np.where(found, np.where(full, overlap, -1).argmax(axis=1), near[rows].argmax(axis=1))
        free[rows, choice] = False
        hit[rows] += found & counted
    return hit, (free & ~case.low & ~case.in_dont_care).sum(axis=1)


def _corners(annotations: list[dict[str, Any]]) -> np.ndarray:
    """Return the boxes, (G, 4) XYXY."""
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
