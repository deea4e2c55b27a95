"""PASCAL VOC 2007's average precision: 11-point interpolated, IoU 0.5, difficult objects ignored."""

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from relvit_d2.evaluation.average_precision import explain_zero_ap
from relvit_d2.evaluation.base import GatheringEvaluator
from relvit_d2.utils.boxes import iou

logger = logging.getLogger(__name__)

MIN_IOU = 0.5
# Multiples of 0.1 in floating point, as in Detectron2 (pascal_voc_evaluation.py, voc_ap): a recall of 3/10 does not
# reach 0.30000000000000004. Exact points would change a class's AP by up to 3/11.
RECALL_POINTS = np.arange(11) * 0.1


class Voc07Evaluator(GatheringEvaluator):
    """The VOC 2007 detection metric (Everingham et al., IJCV 2010) on Detectron2 records.

    The detections of a class in all images are processed in order of decreasing score. Each is compared with the object
    of its class and image that it overlaps most. With IoU > 0.5 the first detection of an object is a true positive and
    further ones are false positives; a detection of an ignored difficult object is neither. All other detections are
    false positives. AP is the mean, over the recalls 0, 0.1, ..., 1, of the maximum precision at that recall or above.

    IoU must exceed 0.5 as in the paper and in Detectron2 (pascal_voc_evaluation.py, voc_eval); the development kit
    accepts an IoU of exactly 0.5 (VOCevaldet.m). Boxes are Detectron2's continuous XYXY with minima one pixel below
    VOC's, so that their IoU equals the kit's IoU of inclusive pixel boxes. Unlike in Detectron2's evaluator, scores and
    coordinates are not rounded, and a class without objects is left out of the mean instead of counting as 0. Equal
    scores are ordered by image id.
    """

    def __init__(
        self, dataset_name: str, records: Sequence[dict[str, Any]], class_names: Sequence[str], ignore_difficult: bool
    ) -> None:
        """Store the ground truth.

        Args:
            dataset_name: for the log.
            records: dicts with ``image_id`` (str or int) and ``annotations``, each with ``bbox``,
                ``bbox_mode``, ``category_id`` in 0..K-1 and, where known, ``difficult`` (0 or 1).
            class_names: names of the K classes.
            ignore_difficult: ignore difficult objects and detections that match them; False makes them ordinary
                objects.
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

    def leave_out(self, image_ids: Collection[Any]) -> None:
        """Remove the objects of images that were not evaluated."""
        images = [self._image_index[image_id] for image_id in image_ids]
        kept = ~np.isin(self._object_key // max(len(self._class_names), 1), images)
        self._object_key, self._object_class = self._object_key[kept], self._object_class[kept]
        self._object_box, self._object_counted = self._object_box[kept], self._object_counted[kept]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the metric of all processes' detections; all processes must call it.

        Returns:
            On the main process ``{"voc07": {"AP50": mean, "AP50-<class>": ...}}`` in percent, NaN for a class without
            objects and for the mean if there are none at all; ``{}`` on other processes.
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

        true_positive, false_positive = self._match(self._key(image, label), box)
        objects = np.bincount(self._object_class[self._object_counted], minlength=len(self._class_names))
        aps, rows = [], []
        for index, name in enumerate(self._class_names):
            of_class = label == index
            hits, misses = np.cumsum(true_positive[of_class]), np.cumsum(false_positive[of_class])
            ap = math.nan
            if objects[index]:
                # 0 hits of 0 detections, before the first counted one: precision 0.
                ap = 100 * interpolated_ap(hits / objects[index], hits / np.maximum(hits + misses, 1))
            aps.append(ap)
            rows.append((name, ap, objects[index], int(of_class.sum())))

        with_objects = [ap for ap in aps if not math.isnan(ap)]
        mean = float(np.mean(with_objects)) if with_objects else math.nan
        self._report(mean, len(with_objects), rows)
        if not mean > 0:
            counted = self._object_key[self._object_counted]
            expected, found = self._pairs(counted), self._pairs(self._key(image, label))
            logger.warning("VOC07 AP50 is %s: %s.", mean, explain_zero_ap(expected, found))
        per_class = {f"AP50-{name}": ap for name, ap in zip(self._class_names, aps, strict=True)}
        return {"voc07": {"AP50": mean, **per_class}}

    def _key(self, image: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Return one integer for each pair of image and class; only boxes with equal keys are compared."""
        return image * len(self._class_names) + label

    def _pairs(self, key: np.ndarray) -> list[tuple[Any, int]]:
        """Return the image ids and classes of keys of :meth:`_key`."""
        ids, count = list(self._image_index), len(self._class_names)
        return [(ids[k // count], k % count) for k in key.tolist()]

    def _match(self, key: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the detections (D,), in order of decreasing score, are true and which are false positives."""
        best, overlap = best_overlaps(key, box, self._object_key, self._object_box)
        overlaps = overlap > MIN_IOU
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
            "VOC07 11-point AP50 of %s: %.2f, the mean of %d classes (%d of %d have no objects).\n%s",
            self._dataset_name,
            mean,
            classes,
            len(rows) - classes,
            len(rows),
            "\n".join(lines),
        )


def interpolated_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the 11-point interpolated average precision in [0, 1].

    ``recall``, not decreasing, and ``precision`` after each detection are (D,), in [0, 1].
    """
    reached = recall >= RECALL_POINTS[:, None]
    return float(np.where(reached, precision, 0.0).max(axis=1, initial=0.0).mean())


def best_overlaps(
    key: np.ndarray, box: np.ndarray, object_key: np.ndarray, object_box: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each detection the object of equal key that it overlaps most.

    Args:
        key: (D,) integers. box: (D, 4) XYXY in continuous pixels.
        object_key: (G,) integers, sorted. object_box: (G, 4) XYXY in continuous pixels.

    Returns:
        (D,) index of the object, the first of several, and (D,) IoU in [0, 1]; index -1 and IoU 0 if no object has the
        detection's key.
    """
    start = np.searchsorted(object_key, key, side="left")
    count = np.searchsorted(object_key, key, side="right") - start
    # One row for each pair of a detection with an object of its key, ordered by detection.
    owner = np.repeat(np.arange(len(key)), count)
    candidate = np.arange(len(owner)) + np.repeat(start - (np.cumsum(count) - count), count)

    pair_iou = iou(box[owner], object_box[candidate])
    order = np.lexsort((-pair_iou, owner))
    found, first = np.unique(owner[order], return_index=True)
    best, overlap = np.full(len(key), -1), np.zeros(len(key))
    best[found], overlap[found] = candidate[order[first]], pair_iou[order[first]]
    return best, overlap
