"""COCO-style average precision for any data set of Detectron2 records."""

import itertools
import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode, PolygonMasks
from detectron2.utils import comm
from pycocotools import mask as mask_util

from relvit_d2.evaluation.average_precision import COCO_LIMIT, coco_evaluation, explain_zero_ap
from relvit_d2.utils.files import write_text

logger = logging.getLogger(__name__)


class CocoStyleEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with the ground truth taken from records.

    Results, tables and ``coco_instances_results.json`` are Detectron2's: AP, AP50, AP75, APs, APm, APl
    and ``AP-<class>`` in percent under ``"bbox"`` and, where masks are predicted, ``"segm"``. The numbers are
    those of pycocotools (see :func:`relvit_d2.evaluation.average_precision.coco_evaluation`).
    Differences from Detectron2:

    * every evaluator writes the ground truth to ``<output_dir>/<dataset_name>_ground_truth.json``: no file of an
      earlier run is read, and the data set's metadata do not change;
    * AP is 0, not NaN, without any detection; it is NaN only without objects or images;
    * a warning gives the reason for an AP of 0 or NaN;
    * masks are evaluated if every object has one; a crowd without a mask is ignored in its whole box;
    * the limit of detections per image is that of the detector, and it is logged;
    * detections of images that the ground truth lacks are left out with a warning.
    """

    def __init__(
        self,
        dataset_name: str,
        records: Sequence[dict[str, Any]] | None,
        class_names: Sequence[str],
        output_dir: str | Path,
        ignore_difficult: bool,
        limit: int = COCO_LIMIT,
    ) -> None:
        """Write the ground truth and load it.

        Args:
            dataset_name: the data set's name; characters that are not valid in the file name are replaced by ``_``.
            records: Detectron2 dicts (see :func:`coco_ground_truth`) with the image ids of the model's inputs; None
                uses the ``json_file`` of the data set's metadata, as ``coco_2017_val`` has.
            class_names: names of the contiguous class ids 0..K-1; unused when ``records`` is None.
            output_dir: folder of all files; created if missing.
            ignore_difficult: see :func:`coco_ground_truth`; unused when ``records`` is None.
            limit: detections per image to evaluate, ``TEST.DETECTIONS_PER_IMAGE``.

        Raises:
            ValueError: ``records`` is None and the data set's metadata has no ``json_file``.
        """
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        self._name = dataset_name
        self._truth_file: Path | None = None
        options: dict[str, Any] = {"output_dir": str(output_dir), "use_fast_impl": False, "max_dets_per_image": limit}
        if records is None:
            if MetadataCatalog.get(dataset_name).get("json_file") is None:
                raise ValueError(f"data set '{dataset_name}' has no json_file in its metadata: pass its records")
            super().__init__(dataset_name, **options)
            if self._do_evaluation and not all(a.get("segmentation") for a in self._coco_api.dataset["annotations"]):
                self._tasks = ("bbox",)
            return

        json_file = self._truth_file = ground_truth_file(output_dir, dataset_name)
        write_text(json_file, json.dumps(coco_ground_truth(records, class_names, ignore_difficult)))
        # Detectron2 reads the path from the global catalog, where it cannot be set twice: use a temporary entry.
        entry = f"{dataset_name} as written to {json_file}"
        MetadataCatalog.get(entry).set(json_file=str(json_file), thing_classes=list(class_names))
        try:
            super().__init__(entry, tasks=None if not without_mask(records) else ("bbox",), **options)
        finally:
            MetadataCatalog.remove(entry)

    def leave_out(self, image_ids: Collection[Any]) -> None:
        """Remove images that were not evaluated from the ground truth, and from its file if this class wrote it."""
        truth = self._coco_api.dataset
        truth["images"] = [image for image in truth["images"] if image["id"] not in image_ids]
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] not in image_ids]
        self._coco_api.createIndex()
        if self._truth_file and comm.is_main_process():
            write_text(self._truth_file, json.dumps(truth))

    def evaluate(self, img_ids: list[Any] | None = None) -> dict[str, dict[str, float]]:
        """Return the results of all processes' detections on the main process, ``{}`` on the others."""
        if not self._do_evaluation or self._coco_api.imgs:
            return super().evaluate(img_ids)
        if not comm.is_main_process():
            return {}
        self._results: dict[str, dict[str, float]] = {}
        self._eval_predictions([])
        return self._results

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[Any] | None = None) -> None:
        detections = list(itertools.chain.from_iterable(prediction["instances"] for prediction in predictions))
        tasks = sorted(self._tasks or self._tasks_from_predictions(detections))
        if not self._do_evaluation or "keypoints" in tasks or img_ids is not None:
            super()._eval_predictions(predictions, img_ids)  # pycocotools, or only the file
            return
        dataset_ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if dataset_ids:
            dataset_id_of = {index: dataset_id for dataset_id, index in dataset_ids.items()}
            for detection in detections:
                detection["category_id"] = dataset_id_of[detection["category_id"]]
        write_text(Path(self._output_dir) / "coco_instances_results.json", json.dumps(detections))
        limit = self._max_dets_per_image[-1]
        for task in tasks:
            logger.info("COCO-style %s AP of %s, at most %d detections per image:", task, self._name, limit)
            evaluation = coco_evaluation(self._coco_api, detections, task, limit)
            results = self._derive_coco_results(evaluation, task, self._metadata.get("thing_classes"))
            if results["AP"] == 0 or math.isnan(results["AP"]):
                objects = [a for a in self._coco_api.dataset["annotations"] if not a.get("iscrowd", 0)]
                expected, found = (
                    [(x["image_id"], x["category_id"]) for x in items] for items in (objects, detections)
                )
                logger.warning("COCO-style %s AP is %s: %s.", task, results["AP"], explain_zero_ap(expected, found))
            self._results[task] = results


def ground_truth_file(folder: Path, dataset_name: str) -> Path:
    """Return the file in ``output_dir`` to which :class:`CocoStyleEvaluator` writes the ground truth."""
    stem = re.sub(r"[^\w.-]+", "_", dataset_name)
    return folder / f"{stem}_ground_truth.json"


def without_mask(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the objects of ``records`` without a mask, crowds excluded."""
    objects = (a for record in records for a in record.get("annotations", []) if not a.get("iscrowd"))
    return [a for a in objects if "segmentation" not in a]


def coco_ground_truth(
    records: Sequence[dict[str, Any]], class_names: Sequence[str], ignore_difficult: bool
) -> dict[str, list[dict[str, Any]]]:
    """Return Detectron2 records in COCO's annotation format.

    Category ids are the contiguous class ids. Areas (small, medium or large) are those of the segmentation if there is
    one, else those of the box. An ignored region without a mask gets its box as mask.

    Args:
        records: dicts with ``file_name``, ``image_id`` (str or int), ``height``, ``width`` and
            ``annotations``, each with ``bbox``, ``bbox_mode``, ``category_id`` and, where known,
            ``iscrowd``, ``difficult`` (1 for an object marked so) and ``segmentation`` (polygons or RLE).
        class_names: names of the classes 0..K-1.
        ignore_difficult: convert difficult objects to ``iscrowd`` regions, COCO's only way to ignore an object: it is
            not counted as missed, and any number of detections of its class may match it, by intersection over the
            detection's area (COCOeval.evaluateImg, maskApi.c:bbIou). False keeps them as ordinary objects.

    Returns:
        ``{"images": [...], "categories": [...], "annotations": [...]}``, ready for ``json.dumps``.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        images.append(
            {
                "id": record["image_id"],
                "file_name": str(record["file_name"]),
                "height": int(record["height"]),
                "width": int(record["width"]),
            }
        )
        for annotation in record.get("annotations", []):
            box = np.asarray([annotation["bbox"]], dtype=np.float64)
            x, y, width, height = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYWH_ABS)[0].tolist()
            ignored = annotation.get("iscrowd", 0) or (ignore_difficult and annotation.get("difficult", 0))
            entry = {
                "id": len(annotations) + 1,  # COCOeval reads 0 as "not matched"
                "image_id": record["image_id"],
                "category_id": int(annotation["category_id"]),
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": int(bool(ignored)),
            }
            if "segmentation" in annotation:
                entry["segmentation"], entry["area"] = _segmentation_and_area(annotation["segmentation"])
            elif ignored:
                x1, y1 = x + width, y + height
                entry["segmentation"] = [[x, y, x1, y, x1, y1, x, y1]]
            annotations.append(entry)
    categories = [{"id": index, "name": name} for index, name in enumerate(class_names)]
    return {"images": images, "categories": categories, "annotations": annotations}


def _segmentation_and_area(segmentation: list[list[float]] | dict[str, Any]) -> tuple[Any, float]:
    """Return polygons or a compressed RLE for JSON, and their area in square pixels."""
    if isinstance(segmentation, list):
        return segmentation, float(PolygonMasks([segmentation]).area()[0])
    counts = segmentation["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {**segmentation, "counts": text}, float(mask_util.area(segmentation))
