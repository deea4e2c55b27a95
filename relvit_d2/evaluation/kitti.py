"""KITTI's average precision: easy, moderate and hard, over 40 recall points and, as it was until 2019, over 11."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode

from relvit_d2.evaluation.average_precision import why_no_precision
from relvit_d2.evaluation.base import Found, GatheringEvaluator

MIN_IOU = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
POINTS = 41
MEASURES = {"AP40": slice(1, None), "AP11": slice(None, None, 4)}
"""The points whose precisions are averaged: recalls 1/40 to 1, and 0, 0.1, ..., 1."""

logger = logging.getLogger(__name__)


class Level(NamedTuple):
    """What an object must be like to count; others are ignored."""

    min_height: int
    """In pixels; a lower detection is ignored too."""
    max_occluded: int
    max_truncated: float


LEVELS = {"easy": Level(40, 0, 0.15), "moderate": Level(25, 1, 0.30), "hard": Level(25, 2, 0.50)}


class _View(NamedTuple):
    """One image, as a class sees it: G objects of the class or of what resembles it, D detections of any class."""

    rivals: list[dict[str, Any]]  # the objects
    box: np.ndarray  # (G, 4)
    overlap: np.ndarray  # (G, D) IoU
    found: Found
    of_class: np.ndarray  # (D,) whether a detection is of the class
    excused: np.ndarray  # (D,) whether it lies in a DontCare region


class _Case(NamedTuple):
    """One image, as a class and a level see it: D detections of the class, and low ones that could be matched."""

    overlap: np.ndarray  # (G, D) IoU
    counted: np.ndarray  # (G,) whether an object counts, rather than being ignored
    low: np.ndarray  # (D,) whether a detection is too low to count
    score: np.ndarray  # (D,)
    excused: np.ndarray  # (D,)


class KittiEvaluator(GatheringEvaluator):
    """The object detection metric of KITTI (Geiger et al., CVPR 2012) on Detectron2 records.

    It follows the official ``evaluate_object.cpp`` (a public copy: xingyizhou/CenterNet at b1b6991,
    ``src/tools/kitti_eval/evaluate_object_3d_offline.cpp``: cleanData, computeStatistics, getThresholds, eval_class):

    * An object of the class counts if its height, occlusion and truncation are within the level (``LEVELS``). Others of
      the class, and those of the class that resembles it (Van for Car, Person_sitting for Pedestrian), are ignored:
      what is matched to one is neither hit nor miss.
    * Detections below the level's least height are ignored; they can be matched, whatever their class. An object that
      no other detection takes is then neither found nor missed.
    * Objects choose in the order of the file, with an IoU above ``MIN_IOU``: the best score, to find the scores at
      which recall is nearest to 0, 1/40, ..., 1; then, for each of those scores and the detections that reach it, the
      greatest overlap. Detections that are left over are false, unless more than ``MIN_IOU`` of their area lies in one
      DontCare region.
    * The precision at each of the 41 points is the greatest from there on; points that are not reached have 0. So n
      perfect detections of n objects score (n - 1) / 40 in AP40, and 1 from 41 objects on.

    AP40 is the benchmark's figure since October 2019 ("Disentangling Monocular 3D Object Detection", Simonelli et
    al., ICCV 2019), AP11 the one before. Where the official program skips a class that is never detected, its AP is 0
    here; a precision of 0 hits of 0 is 0; a class without objects that count is left out of the means.
    """

    def __init__(self, dataset_name: str, records: Sequence[dict[str, Any]], class_names: Sequence[str]) -> None:
        """Take the ground truth from records.

        Args:
            dataset_name: named in the log.
            records: of :func:`relvit_d2.data.detection.kitti.load_kitti`, crowds included.
            class_names: names of the classes; those in ``MIN_IOU`` are evaluated.
        """
        super().__init__(records)
        self._dataset_name = dataset_name
        self._class_names = list(class_names)
        self._objects = [record["annotations"] for record in sorted(records, key=lambda r: str(r["image_id"]))]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the metric of all processes' detections; all of them have to call it.

        Returns:
            On the main process ``{"kitti": {"AP40_easy": mean of the classes, ..., "AP40_easy-Car": ...}}`` in percent,
            for ``AP40`` and ``AP11`` and each level; NaN where no object counts. Elsewhere ``{}``.
        """
        gathered = self.gather()
        if gathered is None:
            return {}
        nothing = Found(-1, np.empty((0, 4)), np.empty(0), np.empty(0, np.int64))
        detections = {found.image: found for found in gathered}
        names = [name for name in MIN_IOU if name in self._class_names]
        means: dict[str, float] = {}
        per_class: dict[str, float] = {}
        counts: dict[tuple[str, str], int] = {}
        most_hits = 0  # moderate objects of a class that are found
        wanted: list[tuple[int, str]] = []  # image and class of the moderate objects
        for name in names:
            views = [self._view(name, index, detections.get(index, nothing)) for index in range(len(self._objects))]
            for level, bounds in LEVELS.items():
                cases = [_case(view, name, bounds) for view in views]
                objects = sum(int(case.counted.sum()) for case in cases)
                precision, hits = precisions(cases, MIN_IOU[name], objects)
                if level == "moderate":
                    most_hits = max(most_hits, hits)
                    wanted += [
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
            reason = why_no_precision(wanted, found, ", ".join(f"{iou} for {name}" for name, iou in MIN_IOU.items()))
            if most_hits:
                reason = "of no class are two objects found, and AP40 leaves out the first of the 41 points"
            logger.warning("KITTI's moderate AP40 is %s: %s.", means["AP40_moderate"], reason)
        return {"kitti": means | per_class}

    def _view(self, name: str, index: int, found: Found) -> _View:
        objects = self._objects[index]
        rivals = [a for a in objects if name in (a["type"], a.get("resembles"))]
        box = _corners(rivals)
        common, area, own_area = _intersections(box, found.box)
        union = area[:, None] + own_area - common
        overlap = np.divide(common, union, out=np.zeros_like(common), where=common > 0)
        inside, _, _ = _intersections(_corners([a for a in objects if a["type"] == "DontCare"]), found.box)
        excused: np.ndarray = np.any(inside > MIN_IOU[name] * own_area, axis=0)
        of_class = found.label == self._class_names.index(name)
        return _View(rivals, box, overlap, found, of_class, excused)

    def _report(
        self,
        names: list[str],
        means: dict[str, float],
        per_class: dict[str, float],
        counts: dict[tuple[str, str], int],
    ) -> None:
        head = "".join(f"{f'{measure} {level}':>16}" for measure in MEASURES for level in LEVELS)
        lines = [f"{'class':12}{head}   objects that count"]
        for name in [*names, "mean"]:
            source, end = (means, "") if name == "mean" else (per_class, f"-{name}")
            aps = "".join(f"{source[f'{measure}_{level}{end}']:16.2f}" for measure in MEASURES for level in LEVELS)
            objects = "" if name == "mean" else ", ".join(str(counts[name, level]) for level in LEVELS)
            lines.append(f"{name:12}{aps}   {objects}")
        logger.info("KITTI's AP of %s, in percent:\n%s", self._dataset_name, "\n".join(lines))


def precisions(cases: Sequence[_Case], min_iou: float, objects: int) -> tuple[np.ndarray, int]:
    """Return the precision, (41,) in [0, 1], at each recall point, and how many objects any detection finds.

    Args:
        cases: the images.
        min_iou: an overlap must be above it.
        objects: how many count, in all images.
    """
    scores = [score for case in cases for score in _hit_scores(case, min_iou)]
    thresholds = np.array(recall_thresholds(scores, objects))
    hit, false = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    for case in cases:
        case_hit, case_false = _judge(case, min_iou, thresholds)
        hit += case_hit
        false += case_false
    precision = np.zeros(POINTS)
    precision[: len(thresholds)] = np.divide(hit, hit + false, out=np.zeros_like(hit), where=hit > 0)
    return np.maximum.accumulate(precision[::-1])[::-1], len(scores)


def recall_thresholds(scores: Sequence[float], objects: int) -> list[float]:
    """Return the scores, falling, 41 at most, at which recall comes nearest to 0, 1/40, 2/40, ...

    Args:
        scores: of the detections that find an object.
        objects: how many there are to find.
    """
    ordered = sorted(scores, reverse=True)
    thresholds: list[float] = []
    wanted = 0.0
    for index, score in enumerate(ordered):
        last = index == len(ordered) - 1
        here, after = (index + 1) / objects, (index + 2) / objects
        if last or after - wanted >= wanted - here:
            thresholds.append(score)
            wanted += 1 / (POINTS - 1)
    return thresholds


def _case(view: _View, name: str, level: Level) -> _Case:
    counted = [
        a["type"] == name and a["occluded"] <= level.max_occluded and a["truncated"] <= level.max_truncated
        for a in view.rivals
    ]
    high = view.box[:, 3] - view.box[:, 1] >= level.min_height
    box, score = view.found.box, view.found.score
    low = box[:, 3] - box[:, 1] < level.min_height
    kept = np.flatnonzero(np.where(low, (view.overlap > MIN_IOU[name]).any(axis=0), view.of_class))
    return _Case(
        view.overlap[:, kept], np.array(counted, dtype=bool) & high, low[kept], score[kept], view.excused[kept]
    )


def _hit_scores(case: _Case, min_iou: float) -> list[float]:
    """Return the scores of the detections that find an object that counts, if each object takes the best score."""
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


def _judge(case: _Case, min_iou: float, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of hits and of false detections, (T,) each, among those that reach each of T scores."""
    free = case.score >= thresholds[:, None]
    hit = np.zeros(len(thresholds))
    for overlap, counted in zip(case.overlap, case.counted, strict=True):
        near = free & (overlap > min_iou)
        rows = np.flatnonzero(near.any(axis=1))
        if not len(rows):
            continue
        full = near[rows] & ~case.low
        found = full.any(axis=1)
        # The greatest overlap; a low detection, the first, only where there is no other.
        choice = np.where(found, np.where(full, overlap, -1).argmax(axis=1), near[rows].argmax(axis=1))
        free[rows, choice] = False
        hit[rows] += found & counted
    return hit, (free & ~case.low & ~case.excused).sum(axis=1)


def _corners(annotations: list[dict[str, Any]]) -> np.ndarray:
    """Return the boxes, (G, 4) XYXY."""
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _intersections(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the areas that each pair has in common, (G, D), and the areas of either, (G,) and (D,)."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    common = (high - low).clip(min=0).prod(axis=2)
    return common, (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), (others[:, 2:] - others[:, :2]).prod(axis=1)
