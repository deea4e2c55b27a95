"""Checks of data before training: counts, anchors, errors, duplicates, and the page of samples."""

import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from PIL import Image

from relvit_d2.analysis.anchors import Anchors, fit_report, proposal, training_boxes
from relvit_d2.analysis.data_checks import before_training, check_images, check_labels
from relvit_d2.analysis.pixel_statistics import pixel_statistics
from relvit_d2.data.detection.catalog import get_images
from relvit_d2.data.detection.custom import config_pairs_of_inputs
from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.report.predictions import Cell
from relvit_d2.report.samples import draw_samples
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import write_voc
from tests.support.scripts import run

CLASSES = ("cat", "dog")
DETECTION = "configs/base/detection.yaml"


def record(name: str, *objects: dict[str, Any], size: tuple[int, int] = (64, 48)) -> dict[str, Any]:
    return {"file_name": name, "image_id": name, "width": size[0], "height": size[1], "annotations": list(objects)}


def thing(*box: float, category: int = 0, mode: BoxMode = BoxMode.XYXY_ABS, **more: int) -> dict[str, Any]:
    return {"bbox": list(box), "bbox_mode": mode, "category_id": category, "iscrowd": 0, **more}


def scattered(count: int, width: int, height: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random boxes inside images of one size."""
    random = np.random.default_rng(seed)
    corners = np.sort(random.uniform(0, 1, (count, 2, 2)), axis=1) * (width, height)
    boxes = corners.reshape(count, 4)
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] > 1).all(1)]
    return boxes, np.tile([width, height], (len(boxes), 1)).astype(float)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_best_iou_equals_that_with_detectron2s_anchors(offset: float) -> None:
    strides, sizes, ratios = (4, 8, 16, 32), ((12.0, 20.0), (40.0,), (64.0,), (130.0,)), ((0.5, 1.0, 2.0),) * 4
    boxes, images = scattered(300, 192, 128)
    generator = DefaultAnchorGenerator(
        sizes=list(map(list, sizes)), aspect_ratios=list(map(list, ratios)), strides=list(strides), offset=offset
    )
    every = Boxes.cat(generator([torch.zeros(1, 1, 128 // stride, 192 // stride) for stride in strides]))
    expected = pairwise_iou(Boxes(torch.tensor(boxes, dtype=torch.float32)), every).max(1).values
    found = Anchors(strides, sizes, ratios, offset).best_ious(boxes, images)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(400, 300), (120, 333)])
def test_boxes_are_resized_like_the_mapper(size: tuple[int, int], tmp_path: Path) -> None:
    sizes = ("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", "160")
    cfg = load_config(DETECTION, [*sizes, "INPUT.RANDOM_FLIP", "none"])
    Image.new("RGB", size).save(tmp_path / "a.png")
    box = [11.0, 17.0, 101.0, 207.0]
    mapped = DetectionMapper(cfg, is_train=True)(record(str(tmp_path / "a.png"), thing(*box), size=size))
    boxes, shape = training_boxes(np.array([box]), np.array([size], dtype=float), cfg)
    assert tuple(shape[0][::-1]) == mapped["image"].shape[1:]
    np.testing.assert_allclose(boxes, mapped["instances"].gt_boxes.tensor, rtol=1e-5)


def test_proposed_anchors_fit_better_than_anchors_of_another_scale() -> None:
    random = np.random.default_rng(0)
    low = random.uniform(0, 100, (500, 2))
    boxes = np.hstack([low, low + random.uniform((6, 12), (10, 20), (500, 2))])
    images = np.full((500, 2), 128.0)
    coarse = Anchors((4, 8, 16, 32, 64), ((64.0,), (128.0,), (256.0,), (512.0,), (512.0,)), ((1.0,),) * 5, 0.0)
    better = proposal(boxes, images, coarse)
    assert better.best_ious(boxes, images).mean() > 0.6 > 0.1 > coarse.best_ious(boxes, images).mean()
    assert [len(level) for level in better.sizes] == [1] * 5
    # Anchors that fit are not replaced by worse ones.
    assert proposal(boxes, images, better).best_ious(boxes, images).mean() >= better.best_ious(boxes, images).mean()


@pytest.mark.parametrize(("box", "size"), [((608, 2), (640, 480)), ((2, 470), (640, 480)), ((2000, 4), (2000, 4))])
def test_flat_boxes_have_anchors(box: tuple[int, int], size: tuple[int, int]) -> None:
    objects = [thing(0, y, box[0], y + box[1]) for y in range(min(size[1] - box[1] + 1, 9))]
    report = check_labels({"set": [record("a", *objects, size=size)] * 30}, CLASSES, load_config(DETECTION, []))
    proposed = report["anchors"]["proposal"]
    (ratios,) = proposed["ASPECT_RATIOS"]
    assert any(ratio == pytest.approx(box[1] / box[0], rel=0.2) for ratio in ratios)  # sides are whole pixels
    assert proposed["best_iou"] > 3 * report["anchors"]["anchors"]["best_iou"] > 0
    assert report["errors"] == []


def test_counts_and_quantiles() -> None:
    cfg = load_config(DETECTION, ["INPUT.MIN_SIZE_TRAIN", "(48,)"])
    records = [
        record("a", thing(0, 0, 10, 10), thing(5, 5, 20, 30, category=0, mode=BoxMode.XYWH_ABS, difficult=1)),
        record("b", thing(1, 1, 9, 9, category=1, iscrowd=1)),
        record("c"),
    ]
    report = check_labels({"set": records}, CLASSES, cfg)
    assert report["sets"]["set"] == {
        "images": 3,
        "objects": 2,
        "crowds": 1,
        "difficult": 1,
        "without_objects": 1,
        "classes": {"cat": 2, "dog": 0},
    }
    assert report["errors"] == []
    assert report["warnings"][0] == "set: classes without objects (1): dog"
    assert report["anchors"]["side"]["99"] == pytest.approx(600**0.5, abs=0.2)
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("objects", "kind", "message"),
    [
        ([thing(0, 0, 5, 5, category=2)], "errors", "category_id outside of 0 to 1 (1): a.jpg"),
        ([thing(0, 0, 5, 5, category=-1)], "errors", "category_id"),
        ([thing(0, 0, float("nan"), 5)], "errors", "not finite numbers (1): a.jpg"),
        ([thing(0, 0, 5)], "errors", "four numbers"),
        ([thing(0, 0, 5, 5, mode=BoxMode.XYXY_REL)], "errors", "bbox_mode"),
        ([thing(9, 9, 9, 12)], "warnings", "without area, which are not trained on (1): a.jpg"),
        ([thing(-9, 0, 9, 12), thing(0, 0, 66, 12)], "warnings", "more than 1 pixel outside of their image"),
    ],
)
def test_invalid_labels_are_reported(objects: list[dict[str, Any]], kind: str, message: str) -> None:
    report = check_labels({"set": [record("a.jpg", *objects)]}, CLASSES, load_config(DETECTION, []))
    assert any(message in line for line in report[kind])


def test_test_sets_without_objects_are_a_warning() -> None:
    cfg = load_config(DETECTION, [])
    valid = [record("a", thing(0, 0, 9, 9), thing(0, 0, 9, 9, category=1))]
    report = check_labels({"train": valid, "bare": [record("b")], "empty": []}, CLASSES, cfg, tests=("bare", "empty"))
    assert report["errors"] == []
    assert report["warnings"] == [
        "bare: the images have no objects, so AP on this set is NaN",
        "empty: there are no images, so AP on this set is NaN",
    ]


def test_more_objects_than_the_detector_returns_are_reported() -> None:
    objects = [thing(0, 0, 9, 9, category=i % 2) for i in range(20)] + [thing(0, 0, 9, 9, iscrowd=1)]
    for limit, warnings in ((20, 0), (19, 1)):
        cfg = load_config(DETECTION, ["TEST.DETECTIONS_PER_IMAGE", str(limit)])
        report = check_labels({"set": [record("a.jpg", *objects)]}, CLASSES, cfg)
        assert len(report["warnings"]) == warnings and report["errors"] == []
    assert "more objects than TEST.DETECTIONS_PER_IMAGE 19" in report["warnings"][0] and "a.jpg" in str(report)


def test_a_training_set_without_objects_is_an_error() -> None:
    sets = {"train": [record("a")], "test": [record("b", thing(0, 0, 5, 5))]}
    cfg = load_config(DETECTION, [])
    error = "train: the images have no objects to train on; label some"
    for training, tests, errors in (
        (("train",), ("test",), [error]),
        (("train",), ("train", "test"), [error]),  # trained and evaluated on
        (("test",), ("train",), []),
        (("train", "test"), ("train",), []),
        ((), ("train",), []),
    ):
        assert check_labels(sets, CLASSES, cfg, training, tests)["errors"] == errors


def test_valid_labels_are_not_reported() -> None:
    objects = [thing(0, 0, 64, 48), thing(-0.5, 0, 9, 48.5, category=1), thing(60, 1, 1, 1, iscrowd=1)]
    report = check_labels({"set": [record("a", *objects)]}, CLASSES, load_config(DETECTION, []))
    assert report["errors"] == report["warnings"] == []


def test_equal_image_ids_are_an_error_in_test_sets() -> None:
    repeated = [record("a", thing(0, 0, 5, 5)), record("b", thing(0, 0, 5, 5)) | {"image_id": "a"}]
    cfg = load_config(DETECTION, [])
    assert any("image ids" in line for line in check_labels({"set": repeated}, CLASSES, cfg, tests=("set",))["errors"])
    report = check_labels({"set": repeated}, CLASSES, cfg)
    assert report["errors"] == [] and any("image ids" in line for line in report["warnings"])


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_every_image_is_read(tmp_path: Path) -> None:
    train, test = tmp_path / "train", tmp_path / "test"
    train.mkdir()
    test.mkdir()
    files = [noise(train / f"{index}.png", index) for index in range(4)]
    shutil.copy(files[0], train / "copy.png")
    Image.open(files[1]).save(test / "other.bmp")  # the same pixels in another format
    cut = noise(test / "cut.png", 9)
    cut.write_bytes(cut.read_bytes()[:300])
    (test / "empty.png").touch()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(test / "flat.png")
    sets = {"train": sorted(train.iterdir()), "test": [*sorted(test.iterdir()), files[2]]}
    cfg = load_config(DETECTION, [])
    report = check_images(sets, cfg, strict=False)
    assert report["images"] == {"read": 7, "unreadable": 2, "one_colour": 1}
    assert report["errors"] == []
    text = " ".join(report["warnings"])
    for part in (
        f"{cut}' is damaged",
        "empty.png' is not an image",
        "one colour (1)",
        "train: images with equal pixels",
    ):
        assert part in text
    shared = f"train and test: images with equal pixels in both (1): {files[1]} = {test / 'other.bmp'}"
    assert shared in report["warnings"]
    assert sorted(map(len, report["duplicates"])) == [2, 2]
    pixels = np.concatenate(
        [np.asarray(Image.open(p)).reshape(-1, 3) for p in [*sets["train"], test / "other.bmp"]]
        + [np.asarray(Image.open(test / "flat.png")).reshape(-1, 3)]
    )
    np.testing.assert_allclose(report["mean"], pixels.mean(0), atol=1e-3)
    np.testing.assert_allclose(report["std"], pixels.std(0), atol=1e-3)
    reversed_ = check_images(sets, load_config(DETECTION, ["INPUT.FORMAT", "BGR"]), strict=False)
    assert reversed_["mean"] == report["mean"][::-1]
    assert len(check_images(sets, cfg, strict=True)["errors"]) == 1


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels_are_read_as_training_reads_them(channels: int, tmp_path: Path) -> None:
    random = np.random.default_rng(channels)
    images = [random.integers(0, 4096, (20, 30, channels), np.uint16) for _ in range(3)]
    for index, image in enumerate(images):
        np.save(tmp_path / f"{index}.npy", image)
    Image.new("RGB", (30, 20)).save(tmp_path / "rgb.png")
    keys = ["INPUT.CHANNELS", str(channels), "INPUT.MAX_VALUE", "4095", "INPUT.FORMAT", "BGR"]
    keys += ["MODEL.PIXEL_MEAN", str([100.0] * channels), "MODEL.PIXEL_STD", str([50.0] * channels)]
    files = sorted(tmp_path.iterdir())
    report = check_images({"set": files}, load_config(DETECTION, keys), strict=True)
    pixels = np.concatenate([(image * (255 / 4095)).round().reshape(-1, channels) for image in images])
    if channels == 1:  # black, turned into gray
        pixels = np.concatenate([pixels, np.zeros((600, 1))])
        assert report["errors"] == [] and report["images"] == {"read": 4, "unreadable": 0, "one_colour": 1}
    else:
        (error,) = report["errors"]
        assert "rgb.png' has 3 channels, but INPUT.CHANNELS is 5" in error
    np.testing.assert_allclose(report["mean"], pixels.mean(0), atol=1e-3)
    np.testing.assert_allclose(report["std"], pixels.std(0), atol=1e-3)
    found = pixel_statistics(files[:3], PixelFormat(channels, 4095))
    np.testing.assert_allclose(found.mean, pixels[:1800].mean(0))


def test_images_in_an_archive_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as packed:
        for index in range(2):
            packed.write(noise(tmp_path / f"{index}.png", 0), f"{index}.png")
    report = check_images({"zip": get_images(str(tmp_path / "photos.zip"))}, load_config(DETECTION, []), strict=False)
    assert report["images"]["read"] == 2 and len(report["duplicates"]) == 1


def test_a_wrong_recorded_size_is_an_error(tmp_path: Path) -> None:
    path = str(noise(tmp_path / "a.png", 0))
    cfg = load_config(DETECTION, [])
    right = {"set": [record(path, size=(40, 30))]}
    assert check_images(right, cfg, strict=True)["errors"] == []
    (error,) = check_images({"set": [record(path, size=(30, 40))]}, cfg, strict=True)["errors"]
    assert f"{path} (recorded 30 x 40, actual 40 x 30)" in error


def test_the_page_of_samples_shows_every_image_and_its_boxes(tmp_path: Path) -> None:
    grey = np.full((48, 64, 3), 128, np.uint8)
    crowded = np.array([[4 * i, 10, 4 * i + 3, 30] for i in range(12)], dtype=float)
    pictures = [
        Cell(grey, np.array([[8.0, 8, 40, 40]]), np.array([1]), ["dog*"], "a.png"),
        Cell(grey, crowded, np.array([0] * 12), ["cat"] * 12, "b.png"),
        Cell(grey, np.zeros((0, 4)), np.zeros(0, int), [], "c.png"),
    ]
    draw_samples(pictures, tmp_path / "page.png", "title")
    with Image.open(tmp_path / "page.png") as page:
        pixels = np.asarray(page)
    assert (pixels == 128).all(-1).mean() > 0.4
    with pytest.raises(ValueError, match="at least one"):
        draw_samples([], tmp_path / "none.png", "title")


def test_check_data_of_a_config(root: Path, tmp_path: Path) -> None:
    names = ("DATASETS.TRAIN", "('svhn_train',)", "DATASETS.TEST", "('svhn_test',)")
    output = tmp_path / "out"
    command = ("relvit-d2", "check-data", "--output", output)
    done = run(root, *command, "--config-file", "configs/demo/streets.yaml", "--show-augmented", *names)
    assert "training can start" in done.stdout
    assert "12 images" in done.stdout
    report = json.loads((output / "check.json").read_text())
    assert report["images"]["read"] == 17 and report["errors"] == []
    for name in ("check.png", "augmented.png"):
        with Image.open(output / name) as page:
            assert page.width > 1000


def test_check_data_of_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    noise(tmp_path / "images/a.png", 0)
    done = run(tmp_path, "relvit-d2", "check-data", "--output", tmp_path / "out", tmp_path / "images")
    assert "1 read" in done.stdout and "pre-training can start (no labels were checked)" in done.stdout
    assert f"warning: {tmp_path / 'images'}: no labels were recognised" in done.stdout
    document = {"images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}], "annotations": []}
    (tmp_path / "images/labels.json").write_text(json.dumps(document))
    done = run(tmp_path, "relvit-d2", "check-data", "--output", tmp_path / "out", tmp_path / "images")
    assert "labels.json has images and annotations but no categories" in done.stdout


def test_check_data_of_a_folder_with_labels_and_of_a_config_for_it(tmp_path: Path) -> None:
    for name, split in (("a", "train"), ("b", "train"), ("c", "val")):
        (tmp_path / f"cells/images/{split}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"cells/labels/{split}").mkdir(parents=True, exist_ok=True)
        gray = np.random.default_rng(ord(name)).integers(0, 256, (30, 40), np.uint8)
        Image.fromarray(gray).save(tmp_path / f"cells/images/{split}/{name}.png")
        (tmp_path / f"cells/labels/{split}/{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n1 0.2 0.2 0.1 0.1\n")
    (tmp_path / "cells/classes.txt").write_text("RBC\nWBC\n")
    done = run(tmp_path, "relvit-d2", "check-data", "--output", tmp_path / "out", tmp_path / "cells")
    assert "training can start" in done.stdout
    report = json.loads((tmp_path / "out/check.json").read_text())
    counts = {name: facts["classes"] for name, facts in report["sets"].items()}
    assert counts == {"cells_train": {"RBC": 2, "WBC": 2}, "cells_val": {"RBC": 1, "WBC": 1}}
    base, config = Path("configs/demo/streets.yaml").absolute(), tmp_path / "gray.yaml"
    config.write_text(
        f"_BASE_: {base}\nINPUT: {{CHANNELS: 1}}\nMODEL: {{PIXEL_MEAN: [100.0], PIXEL_STD: [50.0]}}\n"
        f"DATASETS: {{CUSTOM: {{gray: {{ROOT: {tmp_path}/cells, SPLIT: val}}}}, TRAIN: ['gray'], TEST: []}}\n"
    )
    run(tmp_path, "relvit-d2", "check-data", "--output", tmp_path / "gray", "--config-file", config)
    report = json.loads((tmp_path / "gray/check.json").read_text())
    assert report["sets"]["gray"]["classes"] == {"RBC": 1, "WBC": 1} and len(report["mean"]) == 1
    (tmp_path / "cells/classes.txt").write_text("RBC\n")
    done = run(tmp_path, "relvit-d2", "check-data", "--output", tmp_path / "out", tmp_path / "cells", status=1)
    assert "has the class 1" in done.stderr


def test_folders_whose_data_sets_have_the_same_name_are_rejected(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        folder = tmp_path / parent / "cells"
        folder.mkdir(parents=True)
        noise(folder / "1.png", 0)
        (folder / "1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    a, b = str(tmp_path / "a/cells"), str(tmp_path / "b/cells")
    assert "cells_train" in config_pairs_of_inputs([a])[1]
    with pytest.raises(UserError, match=r"a/cells' and '.*b/cells' both contain the set cells_train"):
        config_pairs_of_inputs([a, b])


def test_each_image_of_a_folder_with_a_trainval_list_is_checked_once(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "cells")
    (root / "ImageSets/Main/trainval.txt").write_text("a\nb\nc\n")
    keys = config_pairs_of_inputs([str(root)])
    assert keys[3] == ("cells_train",) and keys[5] == ("cells_val",)


def test_training_logs_the_checks_and_rejects_invalid_labels(caplog: pytest.LogCaptureFixture) -> None:
    cfg = load_config(DETECTION, ["DATASETS.TRAIN", "('mine',)"])
    right, wrong = record("a.jpg", thing(0, 0, 9, 9)), record("b.jpg", thing(0, 0, 9, 9, category=7))
    with caplog.at_level(logging.INFO):
        before_training(cfg, [right], {"mine": [right]}, CLASSES)
    assert "mine (training): 1 images, 1 objects of 2 classes" in caplog.text
    assert "mine (training) and mine: images in both (1): a.jpg" in caplog.text
    with pytest.raises(UserError, match=r"training cannot start: mine: objects with a category_id .*b\.jpg"):
        before_training(cfg, [right], {"mine": [right, wrong]}, CLASSES)


def test_an_image_with_too_many_objects_is_an_error_in_training() -> None:
    full = record("full.jpg", *[thing(0, 0, 9, 9)] * 10_001)
    cfg = load_config(DETECTION, [])
    (error,) = check_labels({"a": [full], "b": [record("b.jpg", thing(0, 0, 9, 9))]}, CLASSES, cfg, ["a"])["errors"]
    assert error.startswith("a: images with more than 10,000 objects") and error.endswith("(1): full.jpg")
    assert check_labels({"a": [full]}, CLASSES, cfg)["errors"] == []


def test_anchors_that_miss_many_boxes_are_a_warning() -> None:
    tiny = [record(str(i), thing(*box), size=(800, 800)) for i, box in enumerate(scattered(200, 12, 12)[0].tolist())]
    (warning,) = check_labels({"s": tiny}, ("cat",), load_config(DETECTION, []))["warnings"]
    assert "MODEL.ANCHOR_GENERATOR.SIZES '[[" in warning


def test_anchors_of_levels_without_a_known_stride_are_skipped() -> None:
    keys = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
    cfg = load_config(DETECTION, keys)
    assert cfg.MODEL.RPN.IN_FEATURES == ["res4"]
    assert fit_report(*scattered(5, 64, 64), cfg) == {}
