"""Evaluation of masks."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from pycocotools import mask as mask_util

from relvit_d2.evaluation.coco import CocoStyleEvaluator, coco_ground_truth
from tests.support.evaluation_cases import (
    instances,
    record,
)


def test_predicted_masks_are_evaluated(tmp_path: Path) -> None:
    mask = np.zeros((200, 200), np.uint8)
    mask[20:60, 30:90] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    polygon = [30, 20, 90, 20, 90, 60, 30, 60]
    for segmentation in (rle, [polygon]):
        item = {"bbox": [30, 20, 90, 60], "category_id": 0, "segmentation": segmentation}
        records = [record("a", [item])]
        (annotation,) = json.loads(json.dumps(coco_ground_truth(records, ["x"], True)))["annotations"]
        assert annotation["area"] == pytest.approx(40 * 60)
        evaluator = CocoStyleEvaluator("masks", records, ["x"], tmp_path, True)
        evaluator.reset()
        found = instances([([30, 20, 90, 60], 0, 0.9)])
        found.pred_masks = torch.from_numpy(mask[None]).bool()
        evaluator.process([{"image_id": "a"}], [{"instances": found}])
        results = evaluator.evaluate()
        assert results["segm"]["AP"] == pytest.approx(100)
        assert results["bbox"]["AP"] == pytest.approx(100)
    assert isinstance(rle["counts"], bytes)  # the records do not change


def masked(evaluator: CocoStyleEvaluator, image_ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """Results where each image has one detection, of class 0, with the mask of its box."""
    evaluator.reset()
    for image_id in image_ids:
        found = instances([([30, 20, 90, 60], 0, 0.9)])
        mask = torch.zeros(1, 200, 200, dtype=torch.bool)
        mask[:, 20:60, 30:90] = True
        found.pred_masks = mask
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    return evaluator.evaluate()


def test_masks_are_evaluated_only_if_every_object_has_one(tmp_path: Path) -> None:
    item = {"bbox": [30, 20, 90, 60], "category_id": 0}
    whole = item | {"segmentation": [[30, 20, 90, 20, 90, 60, 30, 60]]}
    crowd = {"bbox": [100, 100, 150, 150], "category_id": 0, "iscrowd": 1}
    mixed = [record("a", [whole]), record("b", [item])]
    results = masked(CocoStyleEvaluator("mixed", mixed, ["x"], tmp_path / "mixed", True), "ab")
    assert results.keys() == {"bbox"} and results["bbox"]["AP"] == pytest.approx(100)
    crowded = [record("a", [whole, crowd]), record("b", [whole])]
    results = masked(CocoStyleEvaluator("crowd", crowded, ["x"], tmp_path / "crowd", True), "ab")
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)
    # A COCO file in the data set's metadata, as registered by Detectron2.
    name = "test_evaluation_mixed"
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps(coco_ground_truth(mixed, ["x"], True)))
    try:
        MetadataCatalog.get(name).set(json_file=str(file), thing_classes=["x"])
        results = masked(CocoStyleEvaluator(name, None, ["x"], tmp_path / "file", True), "ab")
    finally:
        MetadataCatalog.remove(name)
    assert results.keys() == {"bbox"} and results["bbox"]["AP"] == pytest.approx(100)
