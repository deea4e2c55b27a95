"""KITTI's metric: each rule by hand, and all against the official program's loops on random scenes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.structures import BoxMode

from relvit_d2.data.detection.kitti import CLASS_SETS, NEIGHBOURS, kitti_ids, load_kitti
from relvit_d2.evaluation.base import ReadableEvaluators
from relvit_d2.evaluation.kitti import LEVELS, MIN_IOU, KittiEvaluator, recall_thresholds
from tests.support.evaluation_cases import Found, Records, run

CLASSES = list(CLASS_SETS[3])
CAR = CLASSES.index("Car")
WALKER = CLASSES.index("Pedestrian")
BOX = [100.0, 100.0, 200.0, 150.0]


def annotation(kind: str, box: list[float], occluded: int = 0, truncated: float = 0.0) -> dict[str, Any]:
    return {
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "iscrowd": int(kind not in CLASSES),
        "type": kind,
        "occluded": occluded,
        "truncated": truncated,
        "resembles": NEIGHBOURS.get(kind),
    }


def scene(*images: list[dict[str, Any]]) -> Records:
    return [{"image_id": f"{index:06d}", "annotations": annotations} for index, annotations in enumerate(images)]


def evaluate(records: Records, *images: list[tuple[list[float], int, float]]) -> dict[str, float]:
    found: Found = {record["image_id"]: image for record, image in zip(records, images, strict=True)}
    return run(KittiEvaluator("scene", records, CLASSES), found)["kitti"]


def place(index: int, height: float = 50.0) -> list[float]:
    """Boxes that do not overlap."""
    return [150.0 * index, 0.0, 150.0 * index + 100, height]


@pytest.mark.parametrize("count", [1, 2, 10, 40, 41, 60])
def test_perfect_detections_have_the_official_ap(count: int) -> None:
    records = scene([annotation("Car", place(index)) for index in range(count)])
    result = evaluate(records, [(place(index), CAR, 1 - index / 100) for index in range(count)])
    reached = min(count, 41)  # points of recall, the first of which is 0
    for level in LEVELS:
        assert result[f"AP40_{level}-Car"] == result[f"AP40_{level}"] == pytest.approx(100 * (reached - 1) / 40)
        assert result[f"AP11_{level}-Car"] == pytest.approx(100 * math.ceil(reached / 4) / 11)
        assert math.isnan(result[f"AP40_{level}-Cyclist"])


def test_false_positive_lowers_precision_below_its_score() -> None:
    # Four cars, scores .9 .8 .7 .6, and a false one at .75: precisions 1, 1, 3/4, 4/5, monotone 1, 1, 4/5, 4/5.
    records = scene([annotation("Car", place(index)) for index in range(4)])
    found = [(place(index), CAR, 0.9 - index / 10) for index in range(4)]
    result = evaluate(records, [*found, (place(9), CAR, 0.75)])
    assert result["AP40_easy-Car"] == pytest.approx(100 * (1 + 0.8 + 0.8) / 40)
    assert result["AP11_easy-Car"] == pytest.approx(100 / 11)


def excess(extra_things: list[dict[str, Any]], extra: list[tuple[list[float], int, float]]) -> dict[str, list[float]]:
    """AP40 of two cars that are found, with more objects and detections of better scores; ``[39 / 40]`` undisturbed.

    Values by class, of easy, moderate and hard, as numbers of false detections that would explain them.
    """
    annotations = [annotation("Car", place(0)), annotation("Car", place(1)), *extra_things]
    result = evaluate(scene(annotations), [*extra, (place(0), CAR, 0.5), (place(1), CAR, 0.4)])
    falses = {}
    for name in CLASSES:
        aps = [result[f"AP40_{level}-{name}"] for level in LEVELS]
        falses[name] = [2 / (40 * ap / 100) - 2 if ap else math.inf for ap in aps]
    return falses


@pytest.mark.parametrize(
    ("extra_things", "extra", "falses"),
    [
        pytest.param([], [], [0, 0, 0], id="nothing else"),
        pytest.param([], [(place(5), CAR, 0.9)], [1, 1, 1], id="a false detection"),
        pytest.param([], [(place(0), CAR, 0.9)], [1, 1, 1], id="a second detection of one car"),
        pytest.param([annotation("Van", place(5))], [(place(5), CAR, 0.9)], [0, 0, 0], id="a van is neutral"),
        pytest.param([annotation("Van", place(5))], [], [0, 0, 0], id="a van need not be found"),
        pytest.param([annotation("Truck", place(5))], [(place(5), CAR, 0.9)], [1, 1, 1], id="a truck is no car"),
        pytest.param([annotation("Misc", place(5))], [(place(5), CAR, 0.9)], [1, 1, 1], id="nor is anything else"),
        pytest.param(
            [annotation("Van", place(5))], [(place(5), CAR, 0.9)] * 2, [1, 1, 1], id="a van is neutral to one detection"
        ),
        pytest.param(
            [annotation("DontCare", place(5))], [(place(5), CAR, 0.9)] * 3, [0, 0, 0], id="a region excuses any number"
        ),
        pytest.param(
            [annotation("DontCare", [750, 0, 820, 50])],
            [(place(5), CAR, 0.9)],
            [1, 1, 1],
            id="70 % inside is not enough",
        ),
        pytest.param(
            [annotation("DontCare", [750, 0, 821, 50])], [(place(5), CAR, 0.9)], [0, 0, 0], id="71 % inside is"
        ),
        pytest.param([], [(place(5, 39), CAR, 0.9)], [0, 1, 1], id="too low to count where 40 pixels are asked"),
        pytest.param([], [(place(5, 24.9), CAR, 0.9)], [0, 0, 0], id="too low to count anywhere"),
        pytest.param([], [(place(5, 25), CAR, 0.9)], [0, 1, 1], id="25 pixels count"),
    ],
)
def test_false_positives(
    extra_things: list[dict[str, Any]], extra: list[tuple[list[float], int, float]], falses: list[float]
) -> None:
    assert excess(extra_things, extra)["Car"] == pytest.approx(falses)


@pytest.mark.parametrize(
    ("car", "counts"),
    [
        pytest.param(annotation("Car", place(5)), [1, 1, 1], id="plain"),
        pytest.param(annotation("Car", place(5), occluded=1), [0, 1, 1], id="partly occluded"),
        pytest.param(annotation("Car", place(5), occluded=2), [0, 0, 1], id="largely occluded"),
        pytest.param(annotation("Car", place(5), occluded=3), [0, 0, 0], id="occluded, not known how"),
        pytest.param(annotation("Car", place(5), truncated=0.15), [1, 1, 1], id="truncated by 0.15"),
        pytest.param(annotation("Car", place(5), truncated=0.3), [0, 1, 1], id="by 0.3"),
        pytest.param(annotation("Car", place(5), truncated=0.5), [0, 0, 1], id="by 0.5"),
        pytest.param(annotation("Car", place(5), truncated=0.51), [0, 0, 0], id="by more"),
        pytest.param(annotation("Car", place(5, 40)), [1, 1, 1], id="40 pixels high"),
        pytest.param(annotation("Car", place(5, 39.9)), [0, 1, 1], id="lower"),
        pytest.param(annotation("Car", place(5, 24.9)), [0, 0, 0], id="too low"),
        pytest.param(annotation("Van", place(5)), [0, 0, 0], id="a van"),
    ],
)
def test_evaluated_cars(car: dict[str, Any], counts: list[int]) -> None:
    # Of five cars four are found, and then the fifth too.
    cars = [annotation("Car", place(index)) for index in range(4)]
    found = [(place(index), CAR, 0.9 - index / 10) for index in range(4)]
    missed = evaluate(scene([*cars, car]), found)
    # A detection matched to it is never a false positive, and a hit if the object is evaluated.
    hit = evaluate(scene([*cars, car]), [(car["bbox"], CAR, 0.95), *found])
    for level, counted in zip(LEVELS, counts, strict=True):
        assert missed[f"AP40_{level}-Car"] == pytest.approx(100 * 3 / 40)
        assert hit[f"AP40_{level}-Car"] == pytest.approx(100 * (3 + counted) / 40)


def test_minimum_overlap_of_each_class_must_be_exceeded() -> None:
    records = scene(
        [
            annotation("Car", place(0)),
            annotation("Car", place(1)),
            annotation("Pedestrian", place(2)),
            annotation("Pedestrian", place(3)),
        ]
    )

    def shifted(index: int, part: float) -> list[float]:
        """A box whose IoU with ``place(index)`` is ``part``."""
        x0, y0, x1, y1 = place(index)
        return [x0, y0, x0 + (x1 - x0) * part, y1]

    for part, car, walker in ((0.5, 0, 0), (0.51, 0, 1), (0.7, 0, 1), (0.71, 1, 1)):
        boxes = [(shifted(i, part), CAR if i < 2 else WALKER, 0.9 - i / 10) for i in range(4)]
        result = evaluate(records, boxes)
        assert result["AP40_hard-Car"] == pytest.approx(car * 100 / 40)
        assert result["AP40_hard-Pedestrian"] == pytest.approx(walker * 100 / 40)


def test_object_matched_to_a_small_detection_is_neither_found_nor_missed() -> None:
    # 41 pixels high; the detection has 39, so that it is too low where 40 are asked, and of another class.
    records = scene([annotation("Car", place(0, 41)), annotation("Car", place(1, 41))])
    result = evaluate(records, [(place(0, 39), WALKER, 0.9), (place(1, 41), CAR, 0.8)])
    assert result["AP40_easy-Car"] == 0  # one found of two: the first point alone
    assert result["AP11_easy-Car"] == pytest.approx(100 / 11)
    assert result["AP11_easy-Pedestrian"] != 0  # NaN: no object


@pytest.mark.parametrize("count", [1, 3, 39, 40, 41, 100, 1000])
def test_at_most_41_thresholds_are_chosen_from_the_scores(count: int) -> None:
    scores = np.random.default_rng(count).random(count).tolist()
    for objects in (count, 2 * count, count + 7):
        thresholds = recall_thresholds(scores, objects)
        assert thresholds == sorted(thresholds, reverse=True)
        assert set(thresholds) <= set(scores)
        assert thresholds[-1] == min(scores)
        assert len(thresholds) <= min(count, 41)


# The official program, loop by loop: evaluate_object.cpp.


def overlap(a: list[float], b: list[float], own: bool = False) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (area_a if own else area_a + area_b - w * h)


def statistics(
    annotations: list[dict[str, Any]],
    found: list[tuple[list[float], int, float]],
    ignored_thing: list[int],
    ignored_found: list[int],
    least: float,
    threshold: float | None,
) -> tuple[list[float], int, int]:
    """Scores of hits, number of hits and of false positives; without a threshold, match the highest score."""
    assigned = [False] * len(found)
    below = [threshold is not None and score < threshold for _, _, score in found]
    scores = []
    for i, item in enumerate(annotations):
        if ignored_thing[i] == -1:
            continue
        chosen, best_score, best_overlap, by_low = -1, -1e7, 0.0, False
        for j, (box, _, score) in enumerate(found):
            if ignored_found[j] == -1 or assigned[j] or below[j]:
                continue
            value = overlap(box, item["bbox"])
            if value <= least:
                continue
            if threshold is None:
                if score > best_score:
                    chosen, best_score = j, score
            elif (value > best_overlap or by_low) and ignored_found[j] == 0:
                chosen, best_overlap, by_low = j, value, False
            elif chosen == -1 and ignored_found[j] == 1:
                chosen, by_low = j, True
        if chosen >= 0:
            assigned[chosen] = True
            if ignored_thing[i] == 0 and ignored_found[chosen] == 0:
                scores.append(found[chosen][2])
    false = 0
    for j, (box, _, _) in enumerate(found):
        if assigned[j] or ignored_found[j] != 0 or below[j]:
            continue
        regions = [item["bbox"] for item in annotations if item["type"] == "DontCare"]
        false += not any(overlap(box, region, own=True) > least for region in regions)
    return scores, len(scores), false


def official_thresholds(scores: list[float], objects: int) -> list[float]:
    scores, thresholds, recall = sorted(scores, reverse=True), [], 0.0
    for i, score in enumerate(scores):
        left = (i + 1) / objects
        right = (i + 2) / objects if i < len(scores) - 1 else left
        if right - recall < recall - left and i < len(scores) - 1:
            continue
        thresholds.append(score)
        recall += 1 / 40
    return thresholds


def official(records: Records, found: Found, name: str, level: int) -> list[float]:
    """The 41 precisions."""
    height, occluded, truncated = (40, 25, 25)[level], (0, 1, 2)[level], (0.15, 0.3, 0.5)[level]
    least = 0.7 if name == "Car" else 0.5
    neighbour = {"Car": "Van", "Pedestrian": "Person_sitting"}.get(name)
    flags, scores, objects = [], [], 0
    for record in records:
        image = found[record["image_id"]]
        ignored_thing, ignored_found = [], []
        for item in record["annotations"]:
            out = (
                item["occluded"] > occluded
                or item["truncated"] > truncated
                or item["bbox"][3] - item["bbox"][1] < height
            )
            if item["type"] == name and not out:
                ignored_thing.append(0)
                objects += 1
            else:
                ignored_thing.append(1 if item["type"] in (name, neighbour) else -1)
        for box, label, _ in image:
            if int(abs(box[3] - box[1])) < height:
                ignored_found.append(1)
            else:
                ignored_found.append(0 if CLASSES[label] == name else -1)
        flags.append((ignored_thing, ignored_found))
        scores += statistics(record["annotations"], image, ignored_thing, ignored_found, least, None)[0]
    thresholds = official_thresholds(scores, objects)
    precision = [0.0] * 41
    for t, threshold in enumerate(thresholds):
        hits = false = 0
        for record, (ignored_thing, ignored_found) in zip(records, flags, strict=True):
            image = found[record["image_id"]]
            _, hit, wrong = statistics(record["annotations"], image, ignored_thing, ignored_found, least, threshold)
            hits, false = hits + hit, false + wrong
        precision[t] = hits / (hits + false) if hits else 0.0
    return [max(precision[t:]) for t in range(41)]


def test_thresholds_equal_the_official_loop() -> None:
    for objects in range(1, 300):
        scores = np.random.default_rng(objects).permutation(objects)[: objects - objects // 7].tolist()
        assert recall_thresholds(scores, objects) == official_thresholds(scores, objects)


def random_scene(seed: int) -> tuple[Records, Found]:
    """Crowded images: objects of all kinds that overlap, detections near them, many equal scores and sizes."""
    rng = np.random.default_rng(seed)
    kinds = ["Car", "Car", "Car", "Van", "Pedestrian", "Pedestrian", "Person_sitting", "Cyclist", "Truck", "DontCare"]
    images, found = [], {}
    for index in range(int(rng.integers(2, 60 if seed % 8 == 0 else 14))):
        annotations = []
        for _ in range(int(rng.integers(0, 8))):
            corner, side = rng.integers(0, 60, 2), rng.choice([20, 25, 30, 39, 40, 45, 60], 2)
            box = [*corner.astype(float), *(corner + side).astype(float)]
            annotations.append(
                annotation(
                    str(rng.choice(kinds)), box, int(rng.integers(0, 4)) // 2, float(rng.choice([0, 0, 0.2, 0.4]))
                )
            )
        boxes: list[tuple[list[float], int, float]] = []
        for item in [*annotations, *annotations]:
            for _ in range(int(rng.integers(0, 3))):
                moved = np.array(item["bbox"]) + rng.normal(0, rng.choice([0.3, 2, 6]), 4)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 1)
                box = moved.astype(np.float32).tolist()
                own = CLASSES.index(item["type"]) if item["type"] in CLASSES and rng.random() < 0.7 else rng.integers(3)
                boxes.append((box, int(own), float(np.float32(rng.integers(1, 20) / 20))))
        order = rng.permutation(len(boxes))
        images.append(annotations)
        found[f"{index:06d}"] = [boxes[i] for i in order]
    return scene(*images), found


@pytest.mark.parametrize("seed", range(30))
def test_random_scenes_equal_the_official_loops(seed: int) -> None:
    records, found = random_scene(seed)
    result = run(KittiEvaluator("random", records, CLASSES), found)["kitti"]
    for level, level_name in enumerate(LEVELS):
        for name in MIN_IOU:
            ap40, ap11 = result[f"AP40_{level_name}-{name}"], result[f"AP11_{level_name}-{name}"]
            precision = official(records, found, name, level)
            if math.isnan(ap40):
                assert sum(precision) == 0
                continue
            assert ap40 == pytest.approx(100 * sum(precision[1:]) / 40, abs=1e-9)
            assert ap11 == pytest.approx(100 * sum(precision[::4]) / 11, abs=1e-9)


def test_random_scenes_cover_all_cases() -> None:
    results = []
    for seed in range(0, 40, 2):
        records, found = random_scene(seed)
        results.append(run(KittiEvaluator("random", records, CLASSES), found)["kitti"])
    for name in MIN_IOU:
        aps = [result[f"AP40_hard-{name}"] for result in results if result[f"AP40_hard-{name}"] > 0]
        assert len(set(aps)) > 5


@pytest.mark.parametrize("count", CLASS_SETS)
def test_perfect_detections_of_the_samples(samples: Path, count: int, log_lines: list[str]) -> None:
    names = list(CLASS_SETS[count])
    folder = samples / "kitti" / "training"
    records = load_kitti(folder, kitti_ids(folder), names)
    found = {
        r["image_id"]: [(a["bbox"], a["category_id"], 0.9) for a in r["annotations"] if not a["iscrowd"]]
        for r in records
    }
    result = run(KittiEvaluator("sample", records, names), found)["kitti"]
    # The one pedestrian is found; the cars are below 25 pixels and 33.26 high, the cyclist's occlusion is not known.
    assert (result["AP11_moderate-Pedestrian"], result["AP11_moderate-Car"]) == pytest.approx((100 / 11, 100 / 11))
    assert result["AP40_moderate"] == 0
    assert math.isnan(result["AP40_hard-Cyclist"]) and math.isnan(result["AP40_easy-Car"])
    assert any("excludes the first of the 41 points" in line for line in log_lines)
    assert any(line.startswith("KITTI's AP of sample") and "Cyclist" in line for line in log_lines)


def test_an_ap_of_0_or_nan_comes_with_the_reason(log_lines: list[str]) -> None:
    assert evaluate(scene([annotation("Car", place(0))]), [])["AP40_moderate"] == 0
    assert "no detections" in log_lines[-1]
    assert evaluate(scene([annotation("Car", place(0))]), [(place(1), CAR, 0.9)])["AP40_moderate"] == 0
    assert "none of the 1 detections overlaps" in log_lines[-1] and "0.7 for Car" in log_lines[-1]
    assert math.isnan(evaluate(scene([annotation("Van", place(0))]), [(place(0), CAR, 0.9)])["AP40_moderate"])
    assert "no ground truth" in log_lines[-1]


def test_results_do_not_depend_on_the_order_of_images() -> None:
    records, found = random_scene(8)
    straight = run(KittiEvaluator("order", records, CLASSES), found)
    turned = run(KittiEvaluator("order", records[::-1], CLASSES), dict(reversed(found.items())))
    assert straight["kitti"] == pytest.approx(turned["kitti"], nan_ok=True, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_images_left_out_do_not_count(seed: int) -> None:
    records, found = random_scene(seed)
    left_out = {record["image_id"] for record in records[1::2]}
    others = [record for record in records if record["image_id"] not in left_out]
    kept = {image_id: boxes for image_id, boxes in found.items() if image_id not in left_out}
    evaluators = ReadableEvaluators([KittiEvaluator("scene", records, CLASSES)], lambda: left_out)
    expected = run(KittiEvaluator("scene", others, CLASSES), kept)
    assert left_out and repr(dict(run(evaluators, kept))) == repr(expected)  # NaN for classes without objects
