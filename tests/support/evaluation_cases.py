"""Ground truth and detections for the tests of the evaluators."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import Boxes, BoxMode, Instances

VOC_CLASSES = list(CLASS_NAMES)
Records = list[dict[str, Any]]
Found = dict[Any, list[tuple[list[float], int, float]]]  # image id -> box, class, score


def record(image_id: str | int, objects: Sequence[dict[str, Any]], side: int = 200) -> dict[str, Any]:
    return {
        "file_name": f"{image_id}.jpg",
        "image_id": image_id,
        "height": side,
        "width": side,
        "annotations": [{"bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0, **item} for item in objects],
    }


def instances(found: Sequence[tuple[list[float], int, float]], side: int = 200) -> Instances:
    return Instances(
        (side, side),
        pred_boxes=Boxes(torch.tensor([box for box, _, _ in found], dtype=torch.float32).reshape(-1, 4)),
        pred_classes=torch.tensor([label for _, label, _ in found], dtype=torch.int64),
        scores=torch.tensor([score for _, _, score in found], dtype=torch.float32),
    )


def run(evaluator: Any, found: Found) -> dict[str, dict[str, float]]:
    """Return an evaluator's results for the images in the order of ``found``, two per batch."""
    evaluator.reset()
    ids = list(found)
    for start in range(0, len(ids), 2):
        batch = ids[start : start + 2]
        evaluator.process(
            [{"image_id": image_id} for image_id in batch],
            [{"instances": instances(found[image_id])} for image_id in batch],
        )
    return evaluator.evaluate()


def truth_as_found(records: Records, difficult_too: bool) -> Found:
    return {
        item["image_id"]: [
            (a["bbox"], a["category_id"], 0.9)
            for a in item["annotations"]
            if difficult_too or not a.get("difficult", 0)
        ]
        for item in records
    }


def voc_records(samples: Path) -> Records:
    """All of VOC's sample images."""
    records = voc_style_records(samples / "VOC2007", VOC_CLASSES)
    assert len(records) == 80
    return records


def voc_style_records(folder: Path, classes: Sequence[str]) -> Records:
    """Read the folder ``Annotations`` independently of the package; boxes without area are left out."""
    records = []
    for path in sorted((folder / "Annotations").glob("*.xml")):
        root = ET.parse(path).getroot()
        objects = []
        for item in root.findall("object"):
            corners = [float(item.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")]
            if corners[0] == corners[2] or corners[1] == corners[3]:
                continue
            objects.append(
                {
                    "bbox": [corners[0] - 1, corners[1] - 1, corners[2], corners[3]],
                    "category_id": classes.index(item.findtext("name", "")),
                    "difficult": int(item.findtext("difficult", "0")),
                }
            )
        records.append(record(path.stem, objects))
    return records


def noisy_detections(records: Records, seed: int) -> Found:
    """Objects moved a little or a lot, found twice, called another class or missed, and boxes of nothing.

    Scores have three decimals, all different, and coordinates one: what Detectron2's VOC evaluator keeps.
    """
    rng = np.random.default_rng(seed)
    scores = iter(rng.permutation(np.arange(1, 1000)) / 1000)
    found: Found = {}
    for item in records:
        boxes: list[tuple[list[float], int, float]] = []
        for annotation in item["annotations"]:
            for _ in range(rng.choice(4, p=(0.15, 0.5, 0.25, 0.1))):
                corners = np.array(annotation["bbox"]).reshape(2, 2)
                spread = (corners[1] - corners[0]) * rng.choice((0.02, 0.1, 0.25))
                moved = np.sort(corners + rng.normal(0, 1, (2, 2)) * spread, axis=0).round(1).ravel()
                label = annotation["category_id"] if rng.random() < 0.9 else int(rng.integers(20))
                boxes.append((moved.tolist(), label, float(next(scores))))
        nothing = np.sort(rng.uniform(0, 180, (2, 2)), axis=0).round(1).ravel()
        boxes.append((nothing.tolist(), int(rng.integers(20)), float(next(scores))))
        found[item["image_id"]] = boxes
    return found


def two_classes(ids: Sequence[str | int]) -> tuple[Records, Found]:
    """Three images with objects of two classes, one of them difficult, and detections of mixed quality."""
    first, second, third = ids
    records = [
        record(first, [{"bbox": [10, 10, 60, 60], "category_id": 0}, {"bbox": [80, 80, 150, 190], "category_id": 1}]),
        record(second, [{"bbox": [20, 30, 90, 90], "category_id": 0, "difficult": 1}]),
        record(third, [{"bbox": [5, 5, 20, 25], "category_id": 1}]),
    ]
    found: Found = {
        first: [([12, 10, 60, 60], 0, 0.9), ([80, 80, 150, 170], 1, 0.8), ([0, 0, 30, 30], 1, 0.7)],
        second: [([20, 30, 88, 90], 0, 0.95)],
        third: [([5, 5, 20, 24], 1, 0.6), ([100, 100, 120, 120], 0, 0.5)],
    }
    return records, found
