"""VOC 2007's metric against Detectron2's voc_eval, all pairs of boxes, and results computed by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.evaluation.pascal_voc_evaluation import voc_eval
from torchvision.ops import box_iou

from relvit_d2.evaluation.voc07 import Voc07Evaluator, best_overlaps, interpolated_ap
from tests.support.evaluation_cases import VOC_CLASSES, Found, noisy_detections, record, run, voc_records


@pytest.mark.parametrize("seed", range(3))
def test_voc07_equals_voc_eval_of_detectron2(samples: Path, tmp_path: Path, seed: int) -> None:
    records = voc_records(samples)
    found = noisy_detections(records, seed)
    results = run(Voc07Evaluator("voc_sample", records, VOC_CLASSES, True), found)["voc07"]

    (tmp_path / "all.txt").write_text("\n".join(item["image_id"] for item in records))
    expected = {}
    for index, name in enumerate(VOC_CLASSES):
        lines = [
            f"{image_id} {score:.3f} {box[0] + 1:.1f} {box[1] + 1:.1f} {box[2]:.1f} {box[3]:.1f}"
            for image_id, boxes in found.items()
            for box, label, score in boxes
            if label == index
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        _, _, expected[name] = voc_eval(
            str(tmp_path / "{}.txt"),
            str(samples / "VOC2007" / "Annotations" / "{}.xml"),
            str(tmp_path / "all.txt"),
            name,
            ovthresh=0.5,
            use_07_metric=True,
        )
    for name in VOC_CLASSES:
        assert results[f"AP50-{name}"] == pytest.approx(100 * expected[name], abs=1e-6)
    assert results["AP50"] == pytest.approx(100 * np.mean(list(expected.values())), abs=1e-6)
    assert 20 < results["AP50"] < 95  # far from both ends of the scale


def test_voc07_by_hand() -> None:
    # Four objects; by decreasing score: hit, miss, hit, the first object again (miss), hit.
    # Recall .25 .25 .50 .50 .75, precision 1 1/2 2/3 2/4 3/5. Greatest precision from a recall on:
    # 1 at 0 .1 .2, 2/3 at .3 .4 .5, 3/5 at .6 .7, 0 at .8 .9 1: (3 + 2 + 6/5) / 11 = 6.2 / 11.
    corners: list[list[float]] = [[0, 0, 50, 50], [100, 100, 150, 150], [0, 100, 50, 150], [100, 0, 150, 50]]
    records = [record("a", [{"bbox": box, "category_id": 0} for box in corners])]
    found: Found = {
        "a": [
            (corners[0], 0, 0.9),
            ([60, 60, 90, 90], 0, 0.8),
            (corners[1], 0, 0.7),
            ([1, 0, 50, 50], 0, 0.6),
            (corners[2], 0, 0.5),
        ]
    }
    results = run(Voc07Evaluator("by_hand", records, ["annotation"], True), found)["voc07"]
    assert results["AP50"] == pytest.approx(100 * 6.2 / 11, abs=1e-9)


def test_interpolated_ap_of_a_perfect_and_an_empty_ranking() -> None:
    assert interpolated_ap(np.arange(1, 6) / 5, np.ones(5)) == 1
    assert interpolated_ap(np.zeros(0), np.zeros(0)) == 0


def test_iou_of_exactly_one_half_is_not_a_match() -> None:
    records = [record(1, [{"bbox": [0, 0, 10, 10], "category_id": 0}])]
    half: Found = {1: [([0, 0, 10, 5], 0, 0.9)]}
    more: Found = {1: [([0, 0, 10, 5.1], 0, 0.9)]}
    evaluator = Voc07Evaluator("half", records, ["annotation"], True)
    assert run(evaluator, half)["voc07"]["AP50"] == 0
    assert run(evaluator, more)["voc07"]["AP50"] == pytest.approx(100)


@pytest.mark.parametrize("seed", range(5))
def test_best_overlaps_equals_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    box, object_box = (
        np.sort(rng.integers(0, 12, (count, 2, 2)), axis=1).reshape(-1, 4).astype(float) for count in (60, 25)
    )
    object_box[:, 2:] += 1  # objects have an area, detections may have none
    key, object_key = rng.integers(0, 6, 60), np.sort(rng.integers(0, 5, 25))
    best, iou = best_overlaps(key, box, object_key, object_box)
    every = box_iou(torch.from_numpy(box), torch.from_numpy(object_box)).numpy()
    for index in range(60):
        candidates = np.flatnonzero(object_key == key[index])
        if len(candidates) == 0:
            assert (best[index], iou[index]) == (-1, 0)
        else:
            assert best[index] == candidates[np.argmax(every[index, candidates])]
            assert iou[index] == pytest.approx(every[index, candidates].max())
