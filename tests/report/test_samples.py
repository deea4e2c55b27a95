"""The picture of augmented training samples."""

from pathlib import Path

import numpy as np
import pytest

from relvit_d2.data.detection.catalog import get_metadata
from relvit_d2.report.samples import MAX_SAMPLES, augmented_samples
from relvit_d2.tasks import load_config
from tests.support.custom_data import picture
from tests.support.scripts import fails

SMALL = ("INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MAX_SIZE_TRAIN", 128, "DATASETS.TEST", ())


def test_masks_and_ignore_regions_are_shown(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(samples))
    classes = get_metadata("coco_2017_train").thing_classes
    pages = []
    for masks in (True, False):
        cfg = load_config("configs/coco_vit_s.yaml", [])
        cfg.merge_from_list(["MODEL.MASK_ON", masks, *SMALL])
        pages.append(augmented_samples(cfg, classes))
    assert len(pages[0]) == len(pages[1]) == MAX_SAMPLES
    ignored = 0
    for cell, plain in zip(*pages, strict=True):
        assert (
            list(cell.labels)
            == [classes[number] if number < len(classes) else "ignored" for number in cell.classes]
            == list(plain.labels)
        )
        ignored += cell.labels.count("ignored")
        height, width = cell.image.shape[:2]
        assert (cell.boxes >= 0).all() and (cell.boxes <= [width, height] * 2).all()
        y, x = np.mgrid[:height, :width] + 0.5
        inside = np.zeros((height, width), bool)
        for left, top, right, bottom in cell.boxes[cell.classes < len(classes)]:
            inside |= (x > left - 1) & (x < right + 1) & (y > top - 1) & (y < bottom + 1)
        changed = (cell.image != plain.image).any(axis=2)
        assert changed.any() == bool((cell.classes < len(classes)).any()) and not (changed & ~inside).any()
    assert ignored > 0


def test_samples_are_those_that_the_config_augments(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    pages = []
    for strength in (0.0, 0.0, 1.0):
        cfg = load_config("configs/demo/streets.yaml", [])
        cfg.merge_from_list(["DATASETS.TRAIN", ("svhn_train",), *SMALL, "INPUT.AUGMENT.MOSAIC", strength])
        pages.append(augmented_samples(cfg, list(map(str, range(10)))))
    first, second, mosaics = ([cell.image for cell in page] for page in pages)
    assert len(first) == len(mosaics) == MAX_SAMPLES and all(map(np.array_equal, first, second))
    assert not any(map(np.array_equal, first, mosaics))


def test_augmented_samples_need_labels(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    message = fails(tmp_path, "relvit-d2", "check-data", tmp_path / "images", "--show-augmented")
    assert "--show-augmented needs training images with labels of objects: give a config for detection" in message
    assert not (tmp_path / "output").exists()
