"""Both evaluators on the same detections; the COCO-style one against pycocotools."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from relvit_d2.data.detection.svhn import load_svhn
from relvit_d2.engine.distributed import leave_process_group
from relvit_d2.evaluation.base import ReadableEvaluators
from relvit_d2.evaluation.coco import CocoStyleEvaluator, coco_ground_truth
from relvit_d2.evaluation.kitti import KittiEvaluator
from relvit_d2.evaluation.voc07 import Voc07Evaluator
from tests.support.evaluation_cases import (
    VOC_CLASSES,
    Found,
    noisy_detections,
    record,
    run,
    truth_as_found,
    two_classes,
    voc_records,
    voc_style_records,
)


@pytest.mark.parametrize("ignore_difficult", [True, False])
def test_coco_style_equals_pycocotools_by_hand(samples: Path, tmp_path: Path, ignore_difficult: bool) -> None:
    records = voc_records(samples)
    found = noisy_detections(records, seed=3)
    evaluator = CocoStyleEvaluator("voc_sample[:80]", records, VOC_CLASSES, tmp_path, ignore_difficult)
    results = run(evaluator, found)["bbox"]

    number = {item["image_id"]: index for index, item in enumerate(records)}
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in number.values()],
        "categories": [{"id": 100 + k} for k in range(20)],
        "annotations": [],
    }
    for item in records:
        for a in item["annotations"]:
            x0, y0, x1, y1 = a["bbox"]
            truth.dataset["annotations"].append(
                {
                    "id": 1 + len(truth.dataset["annotations"]),
                    "image_id": number[item["image_id"]],
                    "category_id": 100 + a["category_id"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": a["difficult"] if ignore_difficult else 0,
                }
            )
    truth.createIndex()
    detections = [
        {
            "image_id": number[image_id],
            "category_id": 100 + label,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
        }
        for image_id, boxes in found.items()
        for box, label, score in boxes
    ]
    expected = COCOeval(truth, truth.loadRes(detections), "bbox")
    expected.evaluate()
    expected.accumulate()
    expected.summarize()
    for name, value in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), expected.stats, strict=False):
        assert results[name] == pytest.approx(100 * value, abs=1e-4), name
    assert 20 < results["AP50"] < 95
    assert set(results) >= {f"AP-{name}" for name in VOC_CLASSES}
    assert (tmp_path / "coco_instances_results.json").is_file()
    assert (tmp_path / "voc_sample_80__ground_truth.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_coco_records_and_coco_json_agree(samples: Path, tmp_path: Path) -> None:
    json_file = samples / "coco" / "annotations" / "instances_val2017.json"
    name = "test_evaluation_coco"
    try:
        records = load_coco_json(str(json_file), str(samples / "coco" / "val2017"), name)
        metadata = MetadataCatalog.get(name)
        metadata.json_file = str(json_file)
        rng = np.random.default_rng(0)
        found: Found = {
            item["image_id"]: [
                ([x + dx, y, x + dx + w, y + h], a["category_id"], float(rng.random()))
                for a in item["annotations"]
                for x, y, w, h in [a["bbox"]]
                for dx in [float(rng.normal(0, 0.15) * w)]
            ]
            for item in records
        }
        own = run(CocoStyleEvaluator(name, None, metadata.thing_classes, tmp_path / "json", True), found)
        ours = run(CocoStyleEvaluator(name, records, metadata.thing_classes, tmp_path / "records", True), found)
    finally:
        MetadataCatalog.remove(name)
    for key in ("AP", "AP50", "AP75", *(k for k in own["bbox"] if k.startswith("AP-"))):
        assert ours["bbox"][key] == pytest.approx(own["bbox"][key], abs=1e-9, nan_ok=True)
    assert 20 < own["bbox"]["AP50"] < 99


def test_perfect_detections_score_100_in_both(samples: Path, tmp_path: Path) -> None:
    records = voc_records(samples)
    coco = CocoStyleEvaluator("perfect", records, VOC_CLASSES, tmp_path, True)
    voc = Voc07Evaluator("perfect", records, VOC_CLASSES, True)
    for difficult_too in (True, False):
        found = truth_as_found(records, difficult_too)
        box = run(coco, found)["bbox"]
        assert [box["AP"], box["AP50"], box["AP75"]] == pytest.approx([100] * 3)
        assert run(voc, found)["voc07"]["AP50"] == pytest.approx(100)


@pytest.mark.parametrize("name", ["coco", "svhn", "bccd"])
def test_perfect_detections_of_other_samples_score_100(samples: Path, tmp_path: Path, name: str) -> None:
    if name == "coco":
        root = samples / "coco"
        records = load_coco_json(str(root / "annotations/instances_val2017.json"), str(root / "val2017"))
    elif name == "svhn":
        records = load_svhn(samples / "svhn/train", skip_missing=True)
    else:
        records = voc_style_records(samples / "bccd/BCCD", ["RBC", "WBC", "Platelets"])
    found: Found = {}
    for item in records:
        item["annotations"] = [{k: v for k, v in a.items() if k != "segmentation"} for a in item["annotations"]]
        found[item["image_id"]] = [
            (BoxMode.convert(list(map(float, a["bbox"])), a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"], 0.9)
            for a in item["annotations"]
            if not a.get("iscrowd", 0)
        ]
    classes = [str(k) for k in range(80)]
    box = run(CocoStyleEvaluator(name, records, classes, tmp_path, True), found)["bbox"]
    assert [box["AP"], box["AP50"], box["AP75"]] == pytest.approx([100] * 3)
    if name != "coco":  # which has crowds
        assert run(Voc07Evaluator(name, records, classes, True), found)["voc07"]["AP50"] == pytest.approx(100)


def test_missed_difficult_objects_lower_ap_only_if_they_are_not_ignored(samples: Path, tmp_path: Path) -> None:
    records = voc_records(samples)
    easy_only = truth_as_found(records, difficult_too=False)
    coco = CocoStyleEvaluator("counted", records, VOC_CLASSES, tmp_path, False)
    voc = Voc07Evaluator("counted", records, VOC_CLASSES, False)
    assert run(coco, easy_only)["bbox"]["AP50"] < 90
    assert run(voc, easy_only)["voc07"]["AP50"] < 90
    everything = truth_as_found(records, difficult_too=True)
    assert run(coco, everything)["bbox"]["AP50"] == pytest.approx(100)
    assert run(voc, everything)["voc07"]["AP50"] == pytest.approx(100)


def test_results_do_not_depend_on_the_order_of_images(samples: Path, tmp_path: Path) -> None:
    records = voc_records(samples)
    found = noisy_detections(records, seed=4)
    # Rounding gives many equal scores, for which the order could matter.
    found = {image_id: [(b, c, round(s, 1)) for b, c, s in boxes] for image_id, boxes in found.items()}
    order = np.random.default_rng(0).permutation(len(records))
    shuffled = [records[i] for i in order]
    shuffled_found = {item["image_id"]: found[item["image_id"]] for item in shuffled}
    straight_voc = run(Voc07Evaluator("order", records, VOC_CLASSES, True), found)
    assert run(Voc07Evaluator("order", shuffled, VOC_CLASSES, True), shuffled_found) == straight_voc
    straight_coco = run(CocoStyleEvaluator("order", records, VOC_CLASSES, tmp_path, True), found)
    assert run(CocoStyleEvaluator("order", shuffled, VOC_CLASSES, tmp_path, True), shuffled_found) == straight_coco


@pytest.mark.parametrize("kind", ["records", "json", "voc07"])
def test_images_left_out_do_not_count(samples: Path, tmp_path: Path, kind: str) -> None:
    records = voc_records(samples)
    left_out = {item["image_id"] for item in records[::3]}
    others = [item for item in records if item["image_id"] not in left_out]
    found = noisy_detections(others, seed=3)

    def evaluator(name: str, items: list[dict[str, Any]]) -> CocoStyleEvaluator | Voc07Evaluator:
        if kind == "voc07":
            return Voc07Evaluator(name, items, VOC_CLASSES, ignore_difficult=True)
        folder = tmp_path / name
        if kind == "records":
            return CocoStyleEvaluator(name, items, VOC_CLASSES, folder, ignore_difficult=True)
        folder.mkdir()
        (folder / "truth.json").write_text(json.dumps(coco_ground_truth(items, VOC_CLASSES, ignore_difficult=True)))
        MetadataCatalog.get(name).set(json_file=str(folder / "truth.json"), thing_classes=VOC_CLASSES)
        return CocoStyleEvaluator(name, None, VOC_CLASSES, folder, ignore_difficult=True)

    expected = run(evaluator("others", others), found)
    evaluators = ReadableEvaluators([evaluator("all", records)], lambda: left_out)
    assert repr(dict(run(evaluators, found))) == repr(dict(expected))  # NaN for classes without objects
    assert evaluators.left_out == left_out
    if kind == "records":
        files = [tmp_path / f"{name}/{name}_ground_truth.json" for name in ("all", "others")]
        images, objects = ([json.loads(file.read_text())[key] for file in files] for key in ("images", "annotations"))
        assert images[0] == images[1] and len(objects[0]) == len(objects[1])
    if kind == "json":
        for name in ("others", "all"):
            MetadataCatalog.remove(name)


def test_image_ids_may_be_text_or_numbers(tmp_path: Path) -> None:
    results = []
    for ids in (("000012", "b", "c"), (12, 3, 70001)):
        records, found = two_classes(ids)
        coco = run(CocoStyleEvaluator("ids", records, ["x", "y"], tmp_path, True), found)
        voc = run(Voc07Evaluator("ids", records, ["x", "y"], True), found)
        results.append({**coco, **voc})
    assert results[0]["voc07"] == results[1]["voc07"]
    assert results[0]["bbox"] == pytest.approx(results[1]["bbox"], nan_ok=True)
    assert results[0]["bbox"]["AP50"] > 0 and results[0]["voc07"]["AP50"] > 0


def test_image_without_record_is_an_error() -> None:
    records, found = two_classes(("a", "b", "c"))
    with pytest.raises(KeyError, match="z"):
        run(Voc07Evaluator("ids", records, ["x", "y"], True), {"z": found["a"]})


def test_no_detections_give_0_and_the_reason(tmp_path: Path, log_lines: list[str]) -> None:
    records, found = two_classes(("a", "b", "c"))
    nothing: Found = {image_id: [] for image_id in found}
    coco = run(CocoStyleEvaluator("nothing", records, ["x", "y"], tmp_path, True), nothing)["bbox"]
    voc = run(Voc07Evaluator("nothing", records, ["x", "y"], True), nothing)["voc07"]
    assert coco["AP"] == coco["AP50"] == coco["AP-x"] == coco["AP-y"] == voc["AP50"] == voc["AP50-x"] == 0
    assert coco["APs"] == 0  # the object of 15 x 20 is small
    assert sum("no detections" in line for line in log_lines) == 2


def test_no_ground_truth_gives_nan_and_the_reason(tmp_path: Path, log_lines: list[str]) -> None:
    _, found = two_classes(("a", "b", "c"))
    only_difficult = {"bbox": [20, 30, 90, 90], "category_id": 0, "difficult": 1}
    records = [record("a", []), record("b", [only_difficult]), record("c", [])]
    coco = run(CocoStyleEvaluator("empty", records, ["x", "y"], tmp_path, True), found)["bbox"]
    voc = run(Voc07Evaluator("empty", records, ["x", "y"], True), found)["voc07"]
    assert math.isnan(coco["AP"]) and math.isnan(voc["AP50"])
    assert sum("no ground truth" in line for line in log_lines) == 2


def test_detections_without_overlap_give_0_and_the_reason(tmp_path: Path, log_lines: list[str]) -> None:
    records, _ = two_classes(("a", "b", "c"))
    wrong: Found = {"a": [([150, 0, 199, 40], 0, 0.9)], "b": [], "c": [([100, 0, 140, 40], 1, 0.9)]}
    coco = run(CocoStyleEvaluator("wrong", records, ["x", "y"], tmp_path, True), wrong)["bbox"]
    voc = run(Voc07Evaluator("wrong", records, ["x", "y"], True), wrong)["voc07"]
    assert coco["AP"] == voc["AP50"] == 0
    assert sum("none of the 2 detections" in line for line in log_lines) == 2


def test_voc07_mean_excludes_classes_without_objects(log_lines: list[str]) -> None:
    records, _ = two_classes(("a", "b", "c"))
    names = ["x", "y", "absent"]
    found = truth_as_found(records, difficult_too=False)
    found["a"].append(([0, 0, 9, 9], 2, 0.99))
    results = run(Voc07Evaluator("absent", records, names, True), found)["voc07"]
    assert results["AP50"] == pytest.approx(100)
    assert math.isnan(results["AP50-absent"])
    assert any("1 of 3 have no object" in line for line in log_lines)


def test_evaluators_with_the_same_name_are_independent(tmp_path: Path) -> None:
    records, _ = two_classes(("a", "b", "c"))
    moved = [
        {**item, "annotations": [{**a, "bbox": [v / 2 for v in a["bbox"]]} for a in item["annotations"]]}
        for item in records
    ]
    before = set(MetadataCatalog.list())
    first = CocoStyleEvaluator("same_name", records, ["x", "y"], tmp_path / "first", True)
    second = CocoStyleEvaluator("same_name", moved, ["x", "y"], tmp_path / "second", True)
    assert set(MetadataCatalog.list()) == before
    perfect = truth_as_found(records, difficult_too=False)
    assert run(second, perfect)["bbox"]["AP50"] < 1
    assert run(first, perfect)["bbox"]["AP50"] == pytest.approx(100)
    # The same folder with other records: an earlier run's ground truth is not used.
    again = CocoStyleEvaluator("same_name", moved, ["x", "y"], tmp_path / "first", True)
    assert run(again, perfect)["bbox"]["AP50"] < 1
    assert run(again, truth_as_found(moved, difficult_too=False))["bbox"]["AP50"] == pytest.approx(100)


def test_records_are_required_without_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unheard_of"):
        CocoStyleEvaluator("unheard_of", None, ["x"], tmp_path, True)
    MetadataCatalog.remove("unheard_of")


@pytest.mark.parametrize("count", [0, 2])
def test_sets_without_objects_or_images_have_no_ap_and_the_reason(
    count: int, tmp_path: Path, log_lines: list[str]
) -> None:
    records = [record(image_id, []) for image_id in "ab"[:count]]
    for found in ({item["image_id"]: boxes for item in records} for boxes in ([], [([20.0, 20, 50, 50], 0, 0.9)])):
        coco = run(CocoStyleEvaluator("bare", records, ["x", "y"], tmp_path, True), found)["bbox"]
        voc = run(Voc07Evaluator("bare", records, ["x", "y"], True), found)["voc07"]
        kitti = run(KittiEvaluator("bare", records, ["Car", "Cyclist"]), found)["kitti"]
        figures = [*coco.values(), *voc.values(), *kitti.values()]
        assert len(figures) > 20 and all(map(math.isnan, figures))
    assert sum("no ground truth" in line for line in log_lines) == 6


def test_detection_limit_is_that_of_the_detector(tmp_path: Path, log_lines: list[str]) -> None:
    boxes = [[x, y, x + 9.0, y + 9.0] for x in range(0, 200, 10) for y in range(0, 80, 10)]
    records = [record("a", [{"bbox": box, "category_id": 0} for box in boxes])]
    found: Found = {"a": [(box, 0, 1 - index / 1000) for index, box in enumerate(boxes)]}
    for limit, ap in ((len(boxes), 100), (1000, 100), (100, 63)):  # 100 of 160 objects: recalls 0 to 0.62 of 101
        results = run(CocoStyleEvaluator("many", records, ["x"], tmp_path, True, limit), found)
        assert results["bbox"]["AP"] == pytest.approx(100 * ap / (100 if ap == 100 else 101))
        assert f"COCO-style bbox AP of many, at most {limit} detections per image:" in log_lines


def test_ids_that_do_not_match_give_0_and_the_reason(tmp_path: Path, log_lines: list[str]) -> None:
    records, found = two_classes((12, 3, 70001))
    strangers: Found = {str(image_id): boxes for image_id, boxes in found.items()}
    coco = run(CocoStyleEvaluator("strangers", records, ["x", "y"], tmp_path, True), strangers)["bbox"]
    assert coco["AP"] == 0
    assert any("6 of 6 detections are left out" in line and "'12'" in line for line in log_lines)
    assert any("the ids do not match" in line and "'12'" in line and "objects 12" in line for line in log_lines)


@pytest.mark.parametrize(("moved", "ap", "ap07"), [(0, 100, 100), (10, 70, 100), (20, 30, 100), (30, 10, 0)])
def test_shifted_boxes_have_the_ap_computed_by_hand(tmp_path: Path, moved: int, ap: float, ap07: float) -> None:
    # A box of 90 x 60 moved by m has IoU (90 - m) / (90 + m): 0.8, 0.636 and 0.5 after 10, 20 and 30, so that it is
    # found at 7, 3 and 1 of the thresholds 0.5, 0.55, ..., 0.95. Exactly 0.5 counts in COCO and not in VOC.
    box, label = [20.0, 20.0, 110.0, 80.0], 0
    records = [record("a", [{"bbox": box, "category_id": label}])]
    found: Found = {"a": [([box[0] + moved, box[1], box[2] + moved, box[3]], label, 0.9)]}
    coco = run(CocoStyleEvaluator("shifted", records, ["x"], tmp_path, True), found)["bbox"]
    voc = run(Voc07Evaluator("shifted", records, ["x"], True), found)["voc07"]
    assert coco["AP"] == pytest.approx(ap)
    assert voc["AP50"] == pytest.approx(ap07)


def _evaluate_share(rank: int, folder: str) -> None:
    """One of two processes: evaluates every other image and writes its results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    records, found = two_classes(("a", "b", "c"))
    share = {image_id: found[image_id] for image_id in list(found)[rank::2]}
    results = {
        **run(CocoStyleEvaluator("shared", records, ["x", "y"], folder, True), share),
        **run(Voc07Evaluator("shared", records, ["x", "y"], True), share),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    leave_process_group()


def test_two_processes_give_the_results_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_evaluate_share, (str(tmp_path),), nprocs=2)
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert other == {}
    records, found = two_classes(("a", "b", "c"))
    coco = run(CocoStyleEvaluator("alone", records, ["x", "y"], tmp_path, True), found)
    voc = run(Voc07Evaluator("alone", records, ["x", "y"], True), found)
    assert main["bbox"] == pytest.approx(coco["bbox"], nan_ok=True)
    assert main["voc07"] == pytest.approx(voc["voc07"], nan_ok=True)
