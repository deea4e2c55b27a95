"""Splits in names of folders and files, and the division of undivided data sets."""

from pathlib import Path

import pytest
from PIL import Image

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import open_folder, register_custom
from relvit_d2.data.detection.splits import split_of, splits_of_folders
from tests.support.custom_data import (
    custom_keys,
    picture,
    stems,
    write_flat_voc,
    write_split_first_coco,
    xml,
    yolo_folder,
)


def test_division_is_deterministic_and_keeps_copies_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "cells"
    for number in range(50):
        picture(root / f"{number}.png", number)
        (root / f"{number}.xml").write_text(xml([("cat", [4, 6, 20, 24])]))
    caplog.set_level("INFO")
    parts = {f"cut_{split}": {"ROOT": str(root), "SPLIT": split} for split in ("train", "val")}
    register_custom(custom_keys(**parts))
    register_custom(custom_keys(cut_all={"ROOT": str(root)}))
    assert "one in 5 held out" in caplog.text
    train, val, whole = (catalog.get_records(f"cut_{name}") for name in ("train", "val", "all"))
    assert (len(train), len(val)) == (40, 10)
    assert sorted(map(str, train + val)) == sorted(map(str, whole))
    for name, records in (("cut_train", train), ("cut_val", val)):
        assert catalog.get_images(name) == [Path(record["file_name"]) for record in records]
    # Copies under other names, in another format and quality, are in the same part as their originals.
    for number in range(50):
        image = Image.open(root / f"{number}.png").resize((80, 60), Image.Resampling.BICUBIC)
        image.save(root / f"a copy of {number}.jpg", quality=80)
        (root / f"a copy of {number}.xml").write_text(xml([("cat", [4, 6, 20, 24])], (80, 60)))
    register_custom(custom_keys(cut_val={"ROOT": str(root), "SPLIT": "val"}))
    names = {Path(str(path)).stem for path in catalog.get_images("cut_val")}
    originals = {name for name in names if not name.startswith("a copy")}
    assert {f"a copy of {name}" for name in originals} == names - originals
    assert len(names) == 20


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("instances_val2017.json", "val"),
        ("_annotations.coco", None),
        ("Training", "train"),
        ("VALID", "val"),
        ("trainval", "trainval"),
        ("restrain", None),
        ("my-test_set", "test"),
    ],
)
def test_split_of_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("images/train/test_site", "images/train", "images/val"), ("train", "train", "val")),
        (("train_set/images/train", "train_set/images/val"), ("train", "val")),  # common folders are ignored
        (("a_test/images/train", "b_test/images/val"), ("train", "val")),
        (("train2017", "val2017/night"), ("train", "val")),
        (("train/val", "valid/train"), ("train", "val")),
        (("train",), (None,)),
        (("a", "b"), (None, None)),
        ((), ()),
    ],
)
def test_outermost_folder_determines_the_split(folders: tuple[str, ...], expected: tuple[str | None, ...]) -> None:
    assert splits_of_folders([folder.split("/") for folder in folders]) == list(expected)


def test_subfolders_of_a_split_in_every_format(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "yolo", "train/test_site/a", "train/b", "val/c")
    assert stems(open_folder(root)[1]) == {"train": ["a", "b"], "val": ["c"]}
    root = write_flat_voc(tmp_path / "voc")
    (root / "train").rename(root / "site")
    (root / "train").mkdir()
    (root / "site").rename(root / "train/test_site")
    assert stems(open_folder(root)[1]) == {"train": ["a", "b"], "val": ["c"]}
    root = write_split_first_coco(tmp_path / "coco")
    (root / "train").rename(root / "site")
    (root / "train").mkdir()
    (root / "site").rename(root / "train/test_site")
    assert stems(open_folder(root)[1]) == {"train": ["a", "b"], "val": ["c"]}
