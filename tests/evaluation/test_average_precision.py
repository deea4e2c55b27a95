"""The fast COCO evaluation against pycocotools, and the reasons for an AP of 0."""

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from relvit_d2.evaluation.average_precision import coco_evaluation, explain_zero_ap
from relvit_d2.evaluation.bootstrap import ap_interval, weighted_ap


def random_case(seed: int, images: int, crowd: float, ids: str) -> tuple[COCO, list[dict[str, Any]]]:
    """Objects with masks in three classes of gapped ids, detections near and far with many equal scores."""
    rng = np.random.default_rng(seed)

    def blob() -> dict[str, Any]:
        mask = np.zeros((120, 160), np.uint8, order="F")
        (y0, x0), (h, w) = rng.integers(0, (100, 140)), rng.integers(4, 120, 2)
        mask[y0 : y0 + h, x0 : x0 + w] = rng.random((120, 160))[y0 : y0 + h, x0 : x0 + w] < 0.8
        rle = mask_util.encode(mask)
        return {"bbox": mask_util.toBbox(rle).tolist(), "segmentation": rle, "area": float(mask_util.area(rle))}

    names = [f"{n:04}" if ids == "text" else 7 * n for n in rng.permutation(images).tolist()]
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for name in names:
        for _ in range(rng.integers(0, 5)):
            own = {"image_id": name, "category_id": int(rng.choice([2, 5, 90]))}
            number = {"id": len(annotations) + 1, "iscrowd": int(rng.random() < crowd)}
            annotations.append({**blob(), **own, **number})
            for _ in range(rng.integers(0, 4)):
                x, y, w, h = np.array(annotations[-1]["bbox"]) + rng.normal(0, 3, 4)
                shape = {"bbox": [x, y, abs(w), abs(h)], "segmentation": annotations[-1]["segmentation"]}
                detections.append({**shape, **own, "score": round(float(rng.random()), 1)})
        for _ in range(rng.integers(0, 60)):
            shape = blob()
            shape.pop("area")
            label = int(rng.choice([2, 5, 90]))
            detections.append({**shape, "image_id": name, "category_id": label, "score": round(float(rng.random()), 1)})
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": name, "height": 120, "width": 160} for name in names],
        "categories": [{"id": label, "name": str(label)} for label in (2, 5, 7, 90)],
        "annotations": annotations,
    }
    truth.createIndex()
    return truth, detections


def official(truth: COCO, detections: list[dict[str, Any]], iou_type: str, limit: int = 100) -> COCOeval:
    """Evaluate with pycocotools as Detectron2 does; its summary is made for a limit of 100 alone."""
    results = [{k: v for k, v in d.items() if k != "bbox" or iou_type == "bbox"} for d in detections]
    found = truth.loadRes(results) if results else COCO()
    if not results:
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    evaluation = COCOeval(truth, found, iou_type)
    evaluation.params.maxDets = [1, 10, limit]
    evaluation.evaluate()
    evaluation.accumulate()
    if limit == 100:
        evaluation.summarize()
    return evaluation


CASES = {
    "many": (1, 12, 0.0, "numbers"),
    "crowd": (2, 12, 0.3, "text"),
    "only crowd": (3, 6, 1.0, "numbers"),
    "one image": (4, 1, 0.2, "text"),
}


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("found", ["some", "none", "more than count"])
@pytest.mark.parametrize("case", CASES)
def test_fast_evaluation_equals_pycocotools(case: str, found: str, iou_type: str) -> None:
    truth, detections = random_case(*CASES[case])
    if found == "none":
        detections = []
    if found == "more than count":  # 100 per image and class
        detections = [{**d, "image_id": detections[0]["image_id"], "category_id": 5} for d in detections]
    expected = official(truth, detections, iou_type)
    ours = coco_evaluation(truth, detections, iou_type)
    np.testing.assert_allclose(ours.stats[:12], expected.stats, rtol=0, atol=1e-12)
    for name in ("precision", "recall"):
        np.testing.assert_allclose(ours.eval[name], expected.eval[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 7, 20, 100, 300])
def test_detection_limit_equals_pycocotools(limit: int) -> None:
    truth, detections = random_case(6, 8, 0.2, "numbers")
    detections = [{**d, "category_id": 5} for d in detections for _ in range(4)]  # up to 240 of an image
    expected = official(truth, detections, "bbox", limit)
    ours = coco_evaluation(truth, detections, "bbox", limit)
    for name in ("precision", "recall"):
        np.testing.assert_allclose(ours.eval[name], expected.eval[name], rtol=0, atol=1e-12)
    precision = expected.eval["precision"][..., 0, -1]
    assert ours.stats[0] == pytest.approx(precision[precision > -1].mean())


def test_object_with_id_0_can_be_matched() -> None:
    truth, _ = random_case(5, 1, 0.0, "numbers")
    box = {"image_id": 0, "category_id": 2, "bbox": [10.0, 10.0, 50.0, 50.0]}
    truth.dataset["annotations"] = [{**box, "id": 0, "area": 2500.0, "iscrowd": 0}]
    truth.createIndex()
    assert coco_evaluation(truth, [{**box, "score": 0.5}], "bbox").stats[0] == pytest.approx(1)


def test_reasons_for_an_ap_of_0() -> None:
    objects = [("a", 0), ("b", 1)]
    reasons: dict[str, tuple[list[tuple[Any, int]], list[tuple[Any, int]]]] = {
        "there is no ground truth": ([], objects),
        "there are no detections": (objects, []),
        "no detection is of an image with objects": (objects, [(1, 0), (2, 1)]),
        "(detections 1; objects 'a', 'b')": (objects, [(1, 0)]),
        "no detection is of a class with objects": (objects, [("a", 5)]),
        "no detection is of a class that its image contains": (objects, [("a", 1)]),
        "none of the 1 detections overlaps": (objects, [("a", 0)]),
    }
    for words, pairs in reasons.items():
        assert words in explain_zero_ap(*pairs)


@pytest.mark.parametrize("seed", range(3))
def test_ap_of_resampled_images_is_that_of_a_test_set_with_copies(seed: int) -> None:
    truth, detections = random_case(seed, 8, 0.1, "text")
    rng = np.random.default_rng(seed)
    for rank, detection in enumerate(rng.permutation(len(detections))):
        detections[detection]["score"] = rank / len(detections)  # the order of equal scores is arbitrary
    ids = sorted(truth.imgs)
    weights = np.array([np.ones(8, dtype=int), *rng.multinomial(8, np.full(8, 1 / 8), 4), [3, 5, 0, 0, 0, 0, 0, 0]])
    for weight, value in zip(weights, weighted_ap(truth, detections, weights, 20), strict=True):
        copies = [(f"{name}/{copy}", name) for name, count in zip(ids, weight, strict=True) for copy in range(count)]
        resampled = COCO()
        resampled.dataset = truth.dataset | {
            "images": [truth.imgs[name] | {"id": copy} for copy, name in copies],
            "annotations": [a | {"image_id": copy} for copy, name in copies for a in truth.imgToAnns[name]],
        }
        resampled.dataset["annotations"] = [
            a | {"id": number} for number, a in enumerate(resampled.dataset["annotations"], start=1)
        ]
        resampled.createIndex()
        found = [d | {"image_id": copy} for copy, name in copies for d in detections if d["image_id"] == name]
        expected = coco_evaluation(resampled, found, "bbox", 20).stats[0]
        assert value == pytest.approx(100 * expected, abs=1e-6)


def test_the_interval_of_ap_narrows_with_the_number_of_images() -> None:
    widths = []
    for images in (10, 90):
        truth, detections = random_case(0, images, 0.0, "text")
        interval = ap_interval(truth, detections)
        assert interval is not None
        ap = 100 * coco_evaluation(truth, detections, "bbox").stats[0]
        assert interval[0] < ap < interval[1]
        widths.append(interval[1] - interval[0])
    assert 1.5 < widths[0] / widths[1] < 6  # 3 by the square root of the number of images
    assert ap_interval(random_case(0, 1, 0.0, "text")[0], []) is None
    truth, _ = random_case(0, 5, 0.0, "number")
    assert ap_interval(truth, []) == (0.0, 0.0)
