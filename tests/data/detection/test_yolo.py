"""YOLO labels of custom data sets."""

from pathlib import Path

import pytest

from relvit_d2.data.detection.custom import open_folder
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import picture, read_all, stems, write_coco, write_yolo, yolo_folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x 0.5 0.5 0.1 0.1", "begins with 'x'"),
        ("2 0.5 0.5 0.1 0.1", "has the class 2, but only the classes 0, 1 have a name"),
        ("-1 0.5 0.5 0.1 0.1", "begins with '-1'"),
        ("0 0.5 0.5 0.1", "3 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "5 numbers"),
        ("0 0.5 0.5 0.1 wide", "not a number"),
        ("0 nan 0.5 0.1 0.1", "not finite"),
        ("0 0.5 0.5 1e999 0.1", "not finite"),
        ("0 0.5 0.5 -0.1 0.1", "negative"),
        ("0 320 240 30 30", "outside its image"),
    ],
)
def test_invalid_line_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    root = write_yolo(tmp_path / "cells")
    (root / "labels/val/c.txt").write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=r"c\.txt, line 2") as caught:
        open_folder(root)[1].records("val", ("cat", "dog"), False)
    assert message in str(caught.value)


def test_polygons_become_masks_and_class_names_are_optional(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "cells")
    (root / "data.yaml").unlink()
    (root / "labels/val/c.txt").write_text("5 0.25 0.2 0.5 0.2 0.25 0.8\n")
    folder = open_folder(root)[1]
    assert folder.classes() == ("0", "1", "5")
    (annotation,) = folder.records("val", folder.classes(), False)[0]["annotations"]
    assert annotation["segmentation"] == [pytest.approx([10, 6, 20, 6, 10, 24])]
    assert (annotation["bbox"], annotation["category_id"]) == (pytest.approx([10, 6, 20, 24]), 2)


@pytest.mark.parametrize("number", ["3", "3.0", "3.", "0.300e+01", "3E0", "+3", "0003", "30e-1"])
def test_class_numbers_in_any_notation(tmp_path: Path, number: str) -> None:
    root = yolo_folder(tmp_path / "cells", "a", "b", label=f"{number} 0.5 0.5 0.4 0.4\n")
    assert open_folder(root)[1].classes() == ("3",)
    (root / "data.yaml").write_text(f"names: {{{number}: cat}}")
    assert open_folder(root)[1].classes() == ("cat",)
    assert [len(record["annotations"]) for record in read_all(root, "yolo")] == [1, 1]


@pytest.mark.parametrize("text", ["3.5", "-3", "1e3000", "nan", "0x3", "3_0", "٣", "1e", "."])
def test_invalid_class_numbers(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="must begin with the number of a class"):
        open_folder(yolo_folder(tmp_path / "cells", "a", label=f"{text} 0.5 0.5 0.4 0.4\n"))[1].classes()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_key_points_are_not_polygon_corners(tmp_path: Path, dimensions: int) -> None:
    points = " 0.9" * (4 * dimensions)
    root = yolo_folder(tmp_path / "cells", "a", label=f"0 0.5 0.5 0.4 0.4{points}\n0 0.5 0.5 0.2 0.2\n")
    (root / "data.yaml").write_text(f"names: [cat]\nkpt_shape: [4, {dimensions}]\n")
    (record,) = read_all(root, "yolo")
    assert [annotation["bbox"] for annotation in record["annotations"]] == [
        pytest.approx([12, 9, 28, 21]),
        pytest.approx([16, 12, 24, 18]),
    ]
    assert all("segmentation" not in annotation for annotation in record["annotations"])
    (root / "labels/a.txt").write_text("0 0.1 0.1 0.9 0.1 0.5 0.8\n")
    with pytest.raises(UserError, match=r"a\.txt, line 1 has 6 numbers after the class: with the kpt_shape"):
        read_all(root, "yolo")


def test_labels_are_found_after_many_unlabelled_images(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "cells", "train/a", "val/b")
    picture(root / "images/test/0.png")
    for number in range(1, 1100):
        (root / f"images/test/{number}.png").hardlink_to(root / "images/test/0.png")
    assert stems(open_folder(root)[1]) == {"train": ["a"], "val": ["b"]}  # a test set without labels is left out


def test_names_in_any_case_and_unicode_form(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "cells", "train/é", "train/b", "val/c")
    (root / "labels/train/b.txt").rename(root / "labels/train/b.TXT")
    (root / "labels/train/é.txt").rename(root / "labels/train/e\u0301.txt")
    for name in ("images", "labels"):
        (root / name).rename(root / name.title())
    assert [len(record["annotations"]) for record in read_all(root, "yolo")] == [1, 1, 1]
    root = write_coco(tmp_path / "coco")
    (root / "annotations/train.json").rename(root / "annotations/Train.JSON")
    assert sorted(open_folder(root)[1].sets) == ["train", "val"]


def test_links_to_labels_are_not_followed_to_find_the_classes(tmp_path: Path) -> None:
    """The classes are those of the labels, which are read before any record."""
    root = write_yolo(tmp_path / "cells")
    (root / "data.yaml").unlink()
    label = next(root.rglob("a.txt"))
    label.rename(tmp_path / "outside.txt")
    label.symlink_to(tmp_path / "outside.txt")
    with pytest.raises(UserError, match="leads out of"):
        open_folder(root)[1].classes()
