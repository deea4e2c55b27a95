"""Labels of other programs: shapes against globox and brute force, where images are found, invalid files."""

import builtins
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from relvit_d2.data.detection.converted import _read_file
from relvit_d2.data.detection.custom import config_pairs, open_folder
from relvit_d2.data.detection.label_programs import Points, ellipse, rotated
from relvit_d2.data.listing import data_lines
from relvit_d2.data.user_cache import cache_root
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import (
    IMAGES,
    cvat_xml,
    picture,
    read_all,
    write_csv,
    write_cvat,
    write_image_folder,
    write_label_studio,
    write_labelme,
    write_parquet,
)

Labels = dict[str, list[tuple[str, list[float]]]]


def labels(root: Path, form: str) -> Labels:
    """Return the class and the box of each object, by the image's name."""
    folder = open_folder(root, form)[1]
    names = folder.classes()
    return {
        Path(record["file_name"]).name: [(names[a["category_id"]], a["bbox"]) for a in record["annotations"]]
        for record in read_all(root, form)
    }


def labelme(root: Path, *shapes: dict[str, Any], name: str = "a", **more: Any) -> Path:
    picture(root / f"{name}.png")
    document = {"imagePath": f"{name}.png", "imageWidth": 40, "imageHeight": 30, "shapes": list(shapes)} | more
    (root / f"{name}.json").write_text(json.dumps(document))
    return root


def outline(kind: str, *points: Sequence[float], label: str = "cat", **more: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": list(points)} | more


def test_boxes_are_those_of_globox(tmp_path: Path) -> None:
    globox = pytest.importorskip("globox", reason="the package globox is not installed")
    random = np.random.default_rng(0)
    images = []
    for name in "abc":
        low = random.integers(0, 15, (4, 2))
        corners = np.stack([low, low + random.integers(1, 15, (4, 2))], axis=1)
        boxes = [(str(random.choice(["cat", "dog"])), [*low, *high]) for low, high in corners.tolist()]
        images.append((name, "train", boxes))
        turned = [outline("rectangle", [x1, y0], [x0, y1], label=kind) for kind, (x0, y0, x1, y1) in boxes]
        triangles = [outline("polygon", [x0, y0], [x1, y1], [x0, y1], label=kind) for kind, (x0, y0, x1, y1) in boxes]
        labelme(tmp_path / "labelme", *turned, *triangles, name=name)
        picture(tmp_path / f"cvat/{name}.png")
    (tmp_path / "cvat/annotations.xml").write_text(cvat_xml(images))
    theirs = {
        "labelme": globox.AnnotationSet.from_labelme(tmp_path / "labelme", include_poly=True),
        "cvat": globox.AnnotationSet.from_cvat(tmp_path / "cvat/annotations.xml"),
    }
    for form, expected in theirs.items():
        ours = labels(tmp_path / form, form)
        assert ours.keys() == expected.image_ids
        for name, objects in ours.items():
            assert [kind for kind, _ in objects] == [box.label for box in expected[name].boxes]
            np.testing.assert_allclose([box for _, box in objects], [box.ltrb for box in expected[name].boxes])


@pytest.mark.parametrize("degrees", [0, 20, 90, 135, 300])
def test_rotated_shapes_are_in_the_smallest_box(degrees: float) -> None:
    """Against a thousand points of the ellipse, and against complex numbers for corners."""
    turn = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    angles = np.linspace(0, 2 * np.pi, 1001)
    outline = (10 + 5j) + (7 * np.cos(angles) + 3j * np.sin(angles)) * turn
    low, high = ellipse(10, 5, 7, 3, degrees)
    found = [*low, *high]
    expected = [outline.real.min(), outline.imag.min(), outline.real.max(), outline.imag.max()]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    corners: Points = [(3, 1), (9, 1), (9, 4)]
    expected_corners = [(1 + 2j) + (complex(*corner) - (1 + 2j)) * turn for corner in corners]
    np.testing.assert_allclose(rotated(corners, (1, 2), degrees), [(z.real, z.imag) for z in expected_corners])


def test_labelme_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    triangle, other = ([2, 2], [10, 2], [2, 12]), ([20, 5], [30, 5], [30, 25])
    root = labelme(
        tmp_path / "a",
        outline("circle", [20, 15], [23, 19]),
        outline("polygon", *triangle, label="dog"),
        outline("polygon", *triangle, group_id=4),
        outline("polygon", *other, group_id=4),
        outline("point", [3, 3]),
        outline("mask", [5, 6], [15, 16], mask="iVBORw0KGgo="),  # of 11 x 11 pixels
    )
    (record,) = read_all(root, "labelme")
    boxes = [annotation["bbox"] for annotation in record["annotations"]]
    assert boxes == [[15, 10, 25, 20], [2, 2, 10, 12], [2, 2, 30, 25], [5, 6, 16, 17]]
    masks = [annotation.get("segmentation") for annotation in record["annotations"]]
    flat = [[float(value) for point in polygon for value in point] for polygon in (triangle, other)]
    assert masks == [None, flat[:1], flat, None]
    assert "a.json are left out, since they are neither boxes nor polygons: 1 point" in caplog.text


def test_cvat_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "images/a.png")
    shapes = (
        '<box label="cat" xtl="10" ytl="10" xbr="20" ybr="14" rotation="90"/>'
        '<ellipse label="cat" cx="20" cy="15" rx="4" ry="3"/>'
        '<polygon label="dog" points="2.0,2.0;10.0,2.0;2.0,12.0"/>'
        '<mask label="dog" rle="1, 2" left="3" top="4" width="5" height="6"/>'
        '<polyline label="dog" points="1,1;2,2"/><tag label="night"/>'
    )
    text = f'<annotations><image id="0" name="a.png" width="40" height="30">{shapes}</image></annotations>'
    (tmp_path / "annotations.xml").write_text(text)
    (record,) = read_all(tmp_path, "cvat")
    boxes = [annotation["bbox"] for annotation in record["annotations"]]
    np.testing.assert_allclose(boxes, [[13, 7, 17, 17], [16, 12, 24, 18], [2, 2, 10, 12], [3, 4, 8, 10]])
    assert [("segmentation" in annotation) for annotation in record["annotations"]] == [False, False, True, False]
    assert "neither boxes nor polygons: 1 polyline" in caplog.text
    (tmp_path / "annotations.xml").write_text('<annotations><track id="0" label="cat"/></annotations>')
    with pytest.raises(UserError, match=r"has tracks: export the task as 'CVAT for images'"):
        read_all(tmp_path, "cvat")


def region(kind: str, names: list[str], **value: Any) -> dict[str, Any]:
    size = {"original_width": 40, "original_height": 30}
    return {"type": kind, "value": value | {kind: names}} | size


def test_label_studio_shapes_and_tasks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a b", "c", "d"):
        picture(tmp_path / f"photos/{name}.png")
    shapes = [
        region("rectanglelabels", ["cat"], x=50, y=50, width=25, height=20, rotation=90),
        region("ellipselabels", ["cat"], x=50, y=50, radiusX=10, radiusY=10, rotation=0),
        region("polygonlabels", ["dog"], points=[[5, 10], [25, 10], [5, 40]]),
        region("brushlabels", ["dog"], rle=[1, 2]),
        {"type": "choices", "value": {"choices": ["night"]}},
    ]
    other = [region("rectanglelabels", ["dog"], x=0, y=0, width=50, height=50)]
    answers: list[tuple[str, list[dict[str, Any]]]] = [
        ("/data/local-files/?d=photos/a%20b.png", [{"result": shapes}, {"result": other}]),
        ("s3://bucket/photos/c.png", [{"result": shapes, "was_cancelled": True}, {"result": []}]),
        ("https://example.org/upload/0123abcd-d.png?x=1", [{"result": []}, {"result": other, "ground_truth": True}]),
        ("/data/upload/e.png", []),
    ]
    tasks = [{"id": n, "data": {"photo": link}, "annotations": given} for n, (link, given) in enumerate(answers)]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    found = labels(tmp_path, "labelstudio")
    assert found.keys() == {"a b.png", "c.png", "d.png"} and found["c.png"] == []
    assert found["d.png"] == [("dog", [0, 0, 20, 15])]
    assert [kind for kind, _ in found["a b.png"]] == ["cat", "cat", "dog"]
    # The rectangle of 10 x 6 at (20, 15) is turned about its first corner.
    np.testing.assert_allclose([b for _, b in found["a b.png"]], [[14, 15, 20, 25], [16, 12, 24, 18], [2, 3, 10, 12]])
    assert "1 tasks of" in caplog.text and "1 brushlabels" in caplog.text


def test_tables(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.jpg")
    (tmp_path / "labels.csv").write_text("x1;Y1;x2;y2;Label;image_id\n4;6;20,5;24;cat;a\n".replace(",", "."))
    assert labels(tmp_path, "csv") == {"a.jpg": [("cat", [4, 6, 20.5, 24])]}
    (tmp_path / "labels.csv").write_text("filename,class,xmin,ymin,xmax,ymax\nimages\\a.jpg,cat,20,6,4,24\n")
    with pytest.raises(UserError, match=r"labels.csv, line 2 has the box .*, of negative width or height"):
        read_all(tmp_path, "csv")
    (tmp_path / "labels.csv").write_text("filename,class,xmin,ymin,xmax,ymax\na.jpg,,4,6,20,24\n")
    with pytest.raises(UserError, match=r"labels.csv, line 2 has a box without a class"):
        read_all(tmp_path, "csv")
    (tmp_path / "labels.csv").write_text("filename,class,xmin,ymin,xmax,ymax\na.jpg,cat,0.1,0.2,0.5,1.0\n")
    with pytest.raises(UserError, match=r"all boxes .* are fractions of the sides: multiply them by"):
        read_all(tmp_path, "csv")
    (tmp_path / "labels.csv").write_bytes("filename,class,xmin,ymin,xmax,ymax\na.jpg,käse,4,6,20,24\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"labels.csv lacks one of these columns or is not UTF-8 text"):
        read_all(tmp_path, "")


def test_images_that_differ_in_their_extension_have_different_ids(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "b.png"):
        picture(tmp_path / "images" / name)
    rows = "".join(f"{name},cat,4,6,20,24\n" for name in ("a.png", "a.bmp", "b.png"))
    (tmp_path / "labels.csv").write_text(f"filename,class,xmin,ymin,xmax,ymax\n{rows}")
    assert [r["image_id"] for r in read_all(tmp_path, "csv")] == ["images/a.png", "images/a.bmp", "images/b"]


def test_metadata_files_with_rows_without_objects(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    box = {"bbox": [1, 2, 10, 12], "label": "cat"}
    given: list[Any] = [[box], [], None, {"bbox": None, "category": None}]
    lines = [json.dumps({"file_name": f"{name}.png", "objects": o}) for name, o in zip("abcd", given, strict=True)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert [len(r["annotations"]) for r in read_all(tmp_path, "huggingface")] == [1, 0, 0, 0]
    (tmp_path / "metadata.jsonl").write_text(lines[0].replace("label", "score"))
    with pytest.raises(UserError, match=r"metadata.jsonl, row 1 has 1 boxes and 0 classes"):
        read_all(tmp_path, "huggingface")
    (tmp_path / "metadata.jsonl").unlink()
    for row, problem in (
        ('"[[1, 2, 10, 12]]",cat', "row 1 has 'cat' in the column label: write it as JSON"),
        ('"[[1, 2, 10, 12]]"', "row 1 has no value in the column label: complete the row"),
    ):
        (tmp_path / "metadata.csv").write_text(f"file_name,bbox,label\na.png,{row}\n")
        with pytest.raises(UserError, match=f"metadata.csv, {problem}"):
            read_all(tmp_path, "huggingface")


def test_files_and_images_that_are_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = labelme(tmp_path / "cells", outline("rectangle", [1, 1], [9, 9]))
    (root / "b.json").write_text('{"imagePath": "b.png"')  # truncated
    open_folder(root)
    assert f"1 files of '{root}' are not in LabelMe's format: {root}/b.json" in caplog.text
    images = [(name, split, [("cat", [4, 6, 20, 24])]) for name, split in (("a", "train"), ("b", "test"), ("c", ""))]
    for name, *_ in images:
        picture(tmp_path / f"cvat/{name}.png")
    (tmp_path / "cvat/annotations.xml").write_text(cvat_xml(images))
    pairs = config_pairs(str(tmp_path / "cvat"), "detection")
    assert pairs[pairs.index("DATASETS.TRAIN") + 1] == ("cvat_train",)
    assert f"images of '{tmp_path}/cvat' that are in none of the sets train, test are left out" in caplog.text


def test_parquet(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "set")
    form, folder = open_folder(root)
    assert (form, folder.classes(), sorted(folder.sets)) == ("huggingface", ("cat", "dog"), ["train", "val"])
    for split in ("train", "val"):
        expected = [objects for _, part, objects in IMAGES if part == split]
        records = folder.records(split, folder.classes(), False)
        assert [[a["bbox"] for a in r["annotations"]] for r in records] == [[b for _, b in o] for o in expected]
        assert [[a["category_id"] for a in r["annotations"]] for r in records] == [
            [("cat", "dog").index(kind) for kind, _ in objects] for objects in expected
        ]
        for record in records:
            assert Image.open(record["file_name"]).size == (record["width"], record["height"])
    assert sorted(path.suffix for path in root.rglob("*.*")) == [".parquet", ".parquet"]
    # Another process can resume a run after the cache was cleared.
    listed = data_lines(read_all(root, ""))
    shutil.rmtree(cache_root() / "parquet")
    _read_file.cache_clear()
    time.sleep(0.01)
    assert data_lines(read_all(root, "")) == listed


def test_a_row_of_a_parquet_file_without_an_image_is_an_error(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the package pyarrow is not installed")
    picture(tmp_path / "a.png")
    objects = {"bbox": [[1.0, 2.0, 10.0, 12.0]], "category": ["cat"]}
    content = (tmp_path / "a.png").read_bytes()
    for empty in (None, {"bytes": None, "path": "b.png"}):
        images = [{"bytes": content, "path": "a.png"}, empty]
        table = pyarrow.Table.from_pylist([{"image": image, "objects": objects} for image in images])
        (tmp_path / "set").mkdir(exist_ok=True)
        parquet.write_table(table, tmp_path / "set/train.parquet")
        with pytest.raises(UserError, match=r"train.parquet, row 2 has no image in the column image: remove the row"):
            open_folder(tmp_path / "set")
    assert not list((cache_root() / "parquet").iterdir())


def test_parquet_without_the_extra_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    original = builtins.__import__

    def without_pyarrow(name: str, *args: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(
        UserError, match=r"train.parquet needs the package pyarrow: run pip install 'relvit_d2\[formats]'"
    ):
        open_folder(tmp_path)


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "set")
    for path in root.glob("*/metadata.jsonl"):
        path.write_text(path.read_text().replace('"cat"', "10").replace('"dog"', "9"))
    assert open_folder(root)[1].classes() == ("9", "10")


def test_images_are_found_by_the_end_of_their_paths(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        picture(tmp_path / f"{folder}/a.png")
    header = "filename,class,xmin,ymin,xmax,ymax\n"
    (tmp_path / "labels.csv").write_text(header + "C:\\photos\\two\\a.png,cat,1,1,9,9\n")
    (record,) = read_all(tmp_path, "csv")
    assert Path(record["file_name"]) == tmp_path / "two/a.png"
    (tmp_path / "labels.csv").write_text(header + "a.png,cat,1,1,9,9\n")
    with pytest.raises(UserError, match=r"one/a.png' and '.*two/a.png' may both be the image 'a.png'"):
        read_all(tmp_path, "csv")
    (tmp_path / "labels.csv").rename(tmp_path / "two/labels.csv")
    (record,) = read_all(tmp_path, "csv")
    assert Path(record["file_name"]) == tmp_path / "two/a.png"
    (tmp_path / "one/labels.csv").write_text(header + "two/a.png,cat,1,1,9,9\n")
    with pytest.raises(UserError, match=r"two/a.png' is labelled twice, in .*one/labels.csv and .*two/labels.csv"):
        read_all(tmp_path, "csv")


def test_a_missing_image_is_an_error_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_cvat(tmp_path / "set")
    (root / "images/b.png").unlink()
    folder = open_folder(root)[1]
    with pytest.raises(
        UserError, match=r"the image 'b.png' of .*annotations.xml is not below .*: put it there, or set"
    ):
        folder.records("train", folder.classes(), False)
    assert [Path(r["file_name"]).name for r in folder.records("train", folder.classes(), True)] == ["a.png"]
    assert "1 images of" in caplog.text


@pytest.mark.parametrize(
    ("writer", "file", "old", "new", "message"),
    [
        (write_labelme, "train/a.json", '"label": "cat"', '"label": ""', "a.json, shape 1 has the class '': set it"),
        (
            write_labelme,
            "train/a.json",
            '"shapes": [',
            '"shapes": [3, ',
            "a.json is damaged or not in LabelMe's format",
        ),
        (write_labelme, "train/a.json", "[20, 6]", "[20, NaN]", "a.json, shape 1 has [20, nan] instead of 2 finite"),
        (write_labelme, "train/a.json", "[20, 6]", "[2000, 6]", "outside its image of 40 x 30 pixels"),
        (write_cvat, "annotations.xml", 'xtl="4.00"', "", "annotations.xml, image 'a.png', shape 1 has"),
        (write_cvat, "annotations.xml", "</image>", "", "annotations.xml is damaged or not in CVAT's format"),
        (write_label_studio, "train.json", '["cat"]', '"cat"', "result 1 has the labels 'cat': write them as a list"),
        (write_label_studio, "train.json", '"original_width": 40, ', "", "(no 'original_width'): export it again"),
        (write_csv, "train/_annotations.csv", ",4,6,", ",4,x,", "_annotations.csv, line 2 has"),
        (write_image_folder, "train/metadata.jsonl", '["cat", "dog"]', '["cat"]', "row 1 has 2 boxes and 1 classes"),
        (write_image_folder, "train/metadata.jsonl", '"file_name"', '"name"', "(no 'file_name'): export it again"),
    ],
)
def test_invalid_files_are_one_sentence(
    writer: Any, file: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    root = writer(tmp_path / "set")
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        read_all(root, "")
    assert message in str(caught.value)
