"""The COCO reader against Detectron2's, and on damaged files."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from relvit_d2.data.detection.coco import CocoFolder, coco_classes, coco_images, load_coco
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import read_all

TRIANGLE = [4.0, 5.0, 20.0, 5.0, 4.0, 25.0]


def content() -> dict[str, Any]:
    """Two images of 40 x 30 pixels, ids and categories with gaps, one box and one polygon."""
    return {
        "images": [
            {"id": 17, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "sub/a.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 8, "image_id": 17, "category_id": 90, "bbox": [4, 5, 16, 20], "segmentation": [TRIANGLE]},
            {"id": 2, "image_id": 17, "category_id": 0, "bbox": [0, 0, 40, 30], "segmentation": [], "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "late"}, {"id": 0, "name": "early"}],
    }


def write(root: Path, document: Any) -> Path:
    for name in ("b.png", "sub/a.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / name)
    path = root / "instances.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_sample_equals_detectron2s_own_reader(samples: Path, split: str) -> None:
    path, folder = samples / f"coco/annotations/instances_{split}2017.json", samples / f"coco/{split}2017"
    ours, theirs = load_coco(path, folder), load_coco_json(str(path), str(folder), f"as detectron2 reads {split}")
    assert len(ours) == len(theirs) == 30
    for mine, other in zip(ours, theirs, strict=True):
        assert {key: mine[key] for key in other if key != "annotations"} == {
            key: value for key, value in other.items() if key != "annotations"
        }
        assert len(mine["annotations"]) == len(other["annotations"])
        for a, b in zip(mine["annotations"], other["annotations"], strict=True):
            assert (a["category_id"], a["iscrowd"]) == (b["category_id"], b["iscrowd"])
            # Some of COCO's boxes exceed their image by less than a pixel.
            np.testing.assert_allclose(a["bbox"], BoxMode.convert(b["bbox"], b["bbox_mode"], a["bbox_mode"]), atol=0.02)
            assert a["segmentation"] == b["segmentation"]


def test_ids_with_gaps_and_sub_folders(tmp_path: Path) -> None:
    path = write(tmp_path, content())
    assert coco_classes(path) == ("early", "late")
    records = load_coco(path, tmp_path)
    assert [record["image_id"] for record in records] == [3, 17]
    assert [Path(record["file_name"]) for record in records] == coco_images(path, tmp_path)
    assert records[0]["annotations"] == []
    polygon, box = records[1]["annotations"]
    assert (polygon["bbox"], polygon["category_id"], polygon["segmentation"]) == ([4, 5, 20, 25], 1, [TRIANGLE])
    assert (box["bbox"], box["category_id"], "segmentation" in box) == ([0, 0, 40, 30], 0, False)


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_masks(tmp_path: Path, compressed: bool) -> None:
    mask = np.zeros((30, 40), np.uint8, order="F")
    mask[5:25, 4:20] = np.random.default_rng(0).random((20, 16)) < 0.5
    runs: Any = mask_util.encode(mask)
    if compressed:
        runs["counts"] = runs["counts"].decode()
    else:
        flat = mask.flatten(order="F")
        ends = np.flatnonzero(np.diff(flat)) + 1
        runs["counts"] = np.diff([0, *ends, flat.size]).tolist()
    document = content()
    document["annotations"][0]["segmentation"] = runs
    annotation = load_coco(write(tmp_path, document), tmp_path)[1]["annotations"][0]
    assert (mask_util.decode(annotation["segmentation"]) == mask).all()


def changed(where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    document = content()
    place: Any = document
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    return document


FIRST = ("annotations", 0)
MASK = (*FIRST, "segmentation")
SIZE = [30, 40]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("images", 0, "id"), 3, "two images with the id 3"),
        (("images", 0, "id"), None, "an image with the id None"),
        (("images", 0, "id"), "a", "that are numbers and image ids that are text"),
        (("images", 0, "file_name"), "../b.png", "not a path inside"),
        (("images", 0, "file_name"), "/etc/passwd", "not a path inside"),
        (("images", 0, "file_name"), "./", "not a path inside"),
        (("images", 0, "file_name"), "C:\\b.png", "not a path inside"),
        (("images", 0, "file_name"), "sub/../../b.png", "not a path inside"),
        (("images", 0, "file_name"), "b\ud800.png", "not a path inside"),
        (("images", 0, "file_name"), ["b.png"], "not a path inside"),
        (("images", 0, "file_name"), "sub/a.png", "more than once"),
        (("images", 0, "file_name"), "c.png", "is missing"),
        (("images", 0, "width"), 0, "has the width 0"),
        (("images", 0, "height"), "high", "the height 'high'"),
        (("images", 0, "height"), 30.5, "the height 30.5"),
        (("images",), {}, "must be a list of objects"),
        (("images",), [], "lists no images"),
        (("images",), [3], "must be a list of objects"),
        (("categories", 0, "id"), 0, "two categories with the id 0"),
        (("categories", 0, "name"), "early", "two categories with the name 'early'"),
        (("categories", 0, "name"), "", "has a category 90"),
        (("categories",), [], "has no categories"),
        ((*FIRST, "id"), 2, "two annotations with the id 2"),
        ((*FIRST, "image_id"), 4, "of the image 4"),
        ((*FIRST, "image_id"), [17], "of the image"),
        ((*FIRST, "category_id"), 1, "has the category 1"),
        ((*FIRST, "iscrowd"), 2, "iscrowd 2"),
        ((*FIRST, "bbox"), [4, 5, 16], "4 finite numbers"),
        ((*FIRST, "bbox"), [4, 5, 16, float("nan")], "4 finite numbers"),
        ((*FIRST, "bbox"), [4, 5, 16, float("inf")], "4 finite numbers"),
        ((*FIRST, "bbox"), [4, 5, 16, 10**400], "4 finite numbers"),
        ((*FIRST, "bbox"), [4, 5, 16, 1e9], "outside its image"),
        ((*FIRST, "bbox"), [4, 5, -16, 20], "negative width"),
        ((*FIRST, "bbox"), [50, 5, 16, 20], "outside its image"),
        ((*FIRST, "bbox"), "here", "4 finite numbers"),
        (MASK, [[1, 2, "x", 3, 4, 5]], "finite numbers"),
        (MASK, [[1e9] * 6], "far outside"),
        (MASK, {"size": SIZE}, "not an RLE"),
        (MASK, {"size": [40, 30], "counts": [1200]}, "its size is"),
        (MASK, {"size": SIZE, "counts": [1201]}, "do not fill"),
        (MASK, {"size": SIZE, "counts": [-5, 1205]}, "do not fill"),
        (MASK, {"size": SIZE, "counts": "~~~"}, "not valid in an RLE"),
        (MASK, {"size": SIZE, "counts": "ooo"}, "cut short"),
        (MASK, {"size": SIZE, "counts": "1" * 99}, "do not fill"),
        (MASK, {"size": SIZE, "counts": "é"}, "neither a list of numbers nor text"),
    ],
)
def test_invalid_annotation_is_an_error(tmp_path: Path, where: tuple[Any, ...], value: Any, message: str) -> None:
    path = write(tmp_path, changed(where, value))
    with pytest.raises(UserError) as caught:
        load_coco(path, tmp_path)
    assert message in str(caught.value)
    assert "instances.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"images": 3}', "[" * 100_000, "\udcff", '{"a": 1' + "0" * 9999])
def test_damaged_file_is_an_error(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "")
    path.write_bytes(text.encode(errors="surrogateescape"))
    for read in (coco_classes, lambda path: load_coco(path, tmp_path), lambda path: coco_images(path, tmp_path)):
        with pytest.raises(UserError, match=r"instances\.json is damaged or not a COCO annotation file"):
            read(path)


@pytest.mark.parametrize(
    "empty",
    [
        [[]],
        [[], []],
        [[1, 1]],
        [[1, 1, 5, 5]],
        [[1, 1, 1, 1, 1, 1]],
        [[1, 1, 1, 5, 1, 9]],
        {"size": [30, 40], "counts": [1200]},
        mask_util.encode(np.zeros((30, 40), np.uint8, order="F")) | {"size": [30, 40]},
    ],
)
def test_empty_mask_keeps_the_box(tmp_path: Path, empty: Any, caplog: pytest.LogCaptureFixture) -> None:
    document = content()
    if isinstance(empty, dict) and isinstance(empty["counts"], bytes):
        empty = empty | {"counts": empty["counts"].decode()}
    document["annotations"][0]["segmentation"] = empty
    document["annotations"].append({"id": 9, "image_id": 3, "category_id": 0, "bbox": [1, 1, 5, 0]})
    records = load_coco(write(tmp_path, document), tmp_path)
    assert [len(record["annotations"]) for record in records] == [0, 2]
    annotation = records[1]["annotations"][0]
    assert annotation["bbox"] == [4, 5, 20, 25] and "segmentation" not in annotation
    assert "1 of the 3 boxes" in caplog.text and "have a mask without area and are kept" in caplog.text
    assert "annotation 8 (b.png)" in caplog.text
    document["annotations"][0]["segmentation"] = [[1, 1], TRIANGLE]
    annotation = load_coco(write(tmp_path, document), tmp_path)[1]["annotations"][0]
    assert annotation["segmentation"] == [TRIANGLE]


def test_numbers_and_flags_in_any_notation(tmp_path: Path) -> None:
    plain = load_coco(write(tmp_path, content()), tmp_path)
    document = content()
    for image in document["images"]:
        image |= {"id": float(image["id"]), "width": str(image["width"]), "height": 3.0e1}
    for annotation in document["annotations"]:
        annotation |= {
            "id": float(annotation["id"]),
            "category_id": f"{annotation['category_id']:.3e}",
            "iscrowd": None,
        }
    for category in document["categories"]:
        category["id"] = str(category["id"])
    assert load_coco(write(tmp_path, document), tmp_path) == plain


def test_root_category_with_the_name_of_a_class(tmp_path: Path) -> None:
    """As exported by Roboflow: a parent of all categories, which may have the name of one of them."""
    document = content()
    document["categories"] = [
        {"id": 0, "name": "early", "supercategory": "none"},
        {"id": 3, "name": "early", "supercategory": "early"},
        {"id": 90, "name": "late", "supercategory": "early"},
    ]
    path = write(tmp_path, document)
    assert coco_classes(path) == ("early", "late")
    assert [annotation["category_id"] for annotation in load_coco(path, tmp_path)[1]["annotations"]] == [1, 0]
    for wrong in ("animal", None):
        for category in document["categories"]:
            category["supercategory"] = wrong
        with pytest.raises(UserError, match="two categories with the name 'early'"):
            coco_classes(write(tmp_path, document))


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_any_normal_form(tmp_path: Path, listed: Any, stored: Any) -> None:
    document = content()
    document["images"][0]["file_name"] = unicodedata.normalize(listed, "été/é.png")
    path = write(tmp_path, document)
    image = tmp_path / unicodedata.normalize(stored, "été/é.png")
    image.parent.mkdir()
    (tmp_path / "b.png").rename(image)
    assert load_coco(path, tmp_path)[1]["file_name"] == str(image)
    assert coco_images(path, tmp_path)[1] == image
    assert CocoFolder.find(tmp_path) and read_all(tmp_path, "coco")[1]["file_name"] == str(image)


def test_boxes_are_clipped_unless_most_exceed_their_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = changed((*FIRST, "bbox"), [-6, 5, 26, 30])
    assert load_coco(write(tmp_path, document), tmp_path)[1]["annotations"][0]["bbox"] == [0, 5, 20, 30]
    assert "1 of the 2 boxes" in caplog.text
    document["annotations"][1]["bbox"] = [0, 0, 60, 45]
    with pytest.raises(UserError, match=r"2 of the 2 boxes .* exceed their images"):
        load_coco(write(tmp_path, document), tmp_path)


def test_links_out_of_the_root_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path = write(root, content())
    (root / "b.png").rename(tmp_path / "outside.png")
    (root / "b.png").symlink_to("../outside.png")
    for read in (load_coco, coco_images):
        for inside in (None, root):
            with pytest.raises(UserError, match="leads out of"):
                read(path, root, root=inside)
    (root / "b.png").unlink()
    (root / "elsewhere").mkdir()
    (tmp_path / "outside.png").rename(root / "elsewhere/c.png")
    (root / "b.png").symlink_to("elsewhere/c.png")
    assert len(load_coco(path, root)) == len(load_coco(path, root, root=root)) == 2
