"""PASCAL VOC 2007's average precision: 11-point interpolated, IoU 0.5, difficult objects ignored."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from relvit_d2.evaluation.average_precision import why_no_precision
from relvit_d2.evaluation.base import GatheringEvaluator

logger = logging.getLogger(__name__)

MIN_IOU = 0.5
# Multiples of 0.1 in floating point: three of ten objects do not reach 0.30000000000000004. Detectron2's points
# are these (pascal_voc_evaluation.py, voc_ap); exact ones would differ from it by up to 3/11 of a class's AP.
RECALL_POINTS = np.arange(11) * 0.1


class Voc07Evaluator(GatheringEvaluator):
    """The VOC 2007 detection metric (Everingham et al., IJCV 2010) on Detectron2 records.

    Detections of a class, over all images, are taken by falling score. Each is compared with the object of
    its class and image that it overlaps most. With IoU > 0.5 it is a true positive the first time that
    object is met and a false positive after that; if the object is difficult and those are ignored, it is
    neither. Any other detection is a false positive. AP is the mean, over the recalls 0, 0.1, ..., 1, of
    the greatest precision at that recall or a higher one.

    The comparison is strict as in the paper and in Detectron2 (pascal_voc_evaluation.py, voc_eval); the
    development kit takes an IoU of exactly 0.5 too (VOCevaldet.m). Boxes are Detectron2's continuous XYXY, whose minima
    lie one pixel below VOC's, so that their plain IoU is the kit's IoU of inclusive pixel boxes. Unlike
    Detectron2's evaluator, scores and coordinates are not rounded, and a class without objects to find is
    left out of the mean, where Detectron2 lets it count as 0. Equal scores are ordered by image id.
    """

    def __init__(
        self, dataset_name: str, records: Sequence[dict[str, Any]], class_names: Sequence[str], ignore_difficult: bool
    ) -> None:
        """Take the ground truth from records.

        Args:
            dataset_name: named in the log.
            records: dicts with ``image_id`` (str or int) and ``annotations``, each with ``bbox``,
                ``bbox_mode``, ``category_id`` in 0..K-1 and, where known, ``difficult`` (0 or 1).
            class_names: names of the K classes.
            ignore_difficult: leave difficult objects and what matches them out of the count; False makes
                them ordinary objects.
        """
        self._dataset_name = dataset_name
        self._class_names = list(class_names)
        super().__init__(records)
        images, classes, boxes, counted = [], [], [], []
        for record in records:
            for annotation in record.get("annotations", []):
                box = np.asarray([annotation["bbox"]], dtype=np.float64)
                images.append(self._image_index[record["image_id"]])
                classes.append(annotation["category_id"])
                boxes.append(BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)[0])
                counted.append(not (ignore_difficult and annotation.get("difficult", 0)))
        key = self._key(np.array(images, dtype=np.int64), np.array(classes, dtype=np.int64))
        order = np.argsort(key, kind="stable")
        self._object_key = key[order]
        self._object_class = np.array(classes, dtype=np.int64)[order]
        self._object_box = np.array(boxes, dtype=np.float64).reshape(-1, 4)[order]
        self._object_counted = np.array(counted, dtype=bool)[order]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the metric of all processes' detections; all of them have to call it.

        Returns:
            On the main process ``{"voc07": {"AP50": mean, "AP50-<class>": ...}}`` in percent, NaN for a
            class without objects to find (and for the mean, if that holds for all); elsewhere ``{}``.
        """
        detections = self.gather()
        if detections is None:
            return {}
        sizes = np.array([len(d.box) for d in detections], dtype=np.int64)
        image = np.repeat(np.array([d.image for d in detections], dtype=np.int64), sizes)
        box = np.concatenate([np.empty((0, 4))] + [d.box for d in detections])
        score = np.concatenate([np.empty(0)] + [d.score for d in detections])
        label = np.concatenate([np.empty(0, np.int64)] + [d.label for d in detections])
        order = np.lexsort((image, -score))
        image, box, label = image[order], box[order], label[order]

        true_positive, false_positive = self._judge(self._key(image, label), box)
        objects = np.bincount(self._object_class[self._object_counted], minlength=len(self._class_names))
        aps, rows = [], []
        for index, name in enumerate(self._class_names):
            own = label == index
            hits, misses = np.cumsum(true_positive[own]), np.cumsum(false_positive[own])
            ap = math.nan
            if objects[index]:
                # Detections of difficult objects come as 0 hits of 0 at first: precision 0, as if missed.
                ap = 100 * interpolated_ap(hits / objects[index], hits / np.maximum(hits + misses, 1))
            aps.append(ap)
            rows.append((name, ap, objects[index], int(own.sum())))

        with_objects = [ap for ap in aps if not math.isnan(ap)]
        mean = float(np.mean(with_objects)) if with_objects else math.nan
        self._report(mean, len(with_objects), rows)
        if not mean > 0:
            counted = self._object_key[self._object_counted]
            wanted, found = self._pairs(counted), self._pairs(self._key(image, label))
            logger.warning("VOC07 AP50 is %s: %s.", mean, why_no_precision(wanted, found))
        per_class = {f"AP50-{name}": ap for name, ap in zip(self._class_names, aps, strict=True)}
        return {"voc07": {"AP50": mean, **per_class}}

    def _key(self, image: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Return one number for each pair of image and class: only boxes with equal ones are compared."""
        return image * len(self._class_names) + label

    def _pairs(self, key: np.ndarray) -> list[tuple[Any, int]]:
        """Return the image ids and classes of numbers of :meth:`_key`."""
        ids, count = list(self._image_index), len(self._class_names)
        return [(ids[k // count], k % count) for k in key.tolist()]

    def _judge(self, key: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the detections (D,), best score first, are true and which false positives."""
        best, iou = best_overlaps(key, box, self._object_key, self._object_box)
        overlaps = iou > MIN_IOU
        hit = np.zeros(len(key), dtype=bool)
        hit[overlaps] = self._object_counted[best[overlaps]]
        neutral = overlaps & ~hit
        true_positive = np.zeros(len(key), dtype=bool)
        _, first = np.unique(best[hit], return_index=True)
        true_positive[np.flatnonzero(hit)[first]] = True
        return true_positive, ~true_positive & ~neutral

    def _report(self, mean: float, classes: int, rows: list[tuple[str, float, int, int]]) -> None:
        width = max(map(len, self._class_names), default=0)
        lines = [f"{'class':{width}}    AP50  objects  detections"]
        lines += [f"{name:{width}}  {ap:6.2f}  {count:7d}  {found:10d}" for name, ap, count, found in rows]
        logger.info(
            "VOC07 11-point AP50 of %s: %.2f, the mean of %d classes (%d of %d have no object to find).\n%s",
            self._dataset_name,
            mean,
            classes,
            len(rows) - classes,
            len(rows),
            "\n".join(lines),
        )


def interpolated_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the 11-point interpolated average precision in [0, 1].

    Args:
        recall: (D,) recall after each detection, in [0, 1], never falling.
        precision: (D,) precision after each detection, in [0, 1].
    """
    reached = recall >= RECALL_POINTS[:, None]
    return float(np.where(reached, precision, 0.0).max(axis=1, initial=0.0).mean())


def best_overlaps(
    key: np.ndarray, box: np.ndarray, object_key: np.ndarray, object_box: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find, for each detection, the object of equal key that it overlaps most.

    Args:
        key: (D,) integers. box: (D, 4) XYXY in continuous pixels.
        object_key: (G,) integers, sorted. object_box: (G, 4) XYXY in continuous pixels.

    Returns:
        (D,) index of the object, the first of equals, and (D,) IoU in [0, 1]; index -1 and IoU 0 where no
        object has the detection's key.
    """
    start = np.searchsorted(object_key, key, side="left")
    count = np.searchsorted(object_key, key, side="right") - start
    # One row for each pair of a detection with an object of its key, detection after detection.
    owner = np.repeat(np.arange(len(key)), count)
    candidate = np.arange(len(owner)) + np.repeat(start - (np.cumsum(count) - count), count)

    a, b = box[owner], object_box[candidate]
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = sides.clip(min=0).prod(axis=1)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(axis=1), (b[:, 2:] - b[:, :2]).prod(axis=1)
    union = area_a + area_b - intersection
    pair_iou = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)

    order = np.lexsort((-pair_iou, owner))
    found, first = np.unique(owner[order], return_index=True)
    best, iou = np.full(len(key), -1), np.zeros(len(key))
    best[found], iou[found] = candidate[order[first]], pair_iou[order[first]]
    return best, iou
