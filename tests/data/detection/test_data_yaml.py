"""Class names, key points and splits from data.yaml and similar files."""

from pathlib import Path

import pytest

from relvit_d2.data.detection.custom import open_folder
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import picture, read_all, stems, write_yolo, yolo_folder


@pytest.mark.parametrize("text", ["names: [a, a]", "names: 3", "names: {x: y}", "names: [[1]]", "a: *b", "[" * 800])
def test_invalid_class_names_are_errors(tmp_path: Path, text: str) -> None:
    root = write_yolo(tmp_path / "cells")
    (root / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=r"data\.yaml"):
        open_folder(root)[1].classes()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [no, yes, 010, 12:30, 1e3, ~, 2001-01-01, null, 0x1F]", "no yes 010 12:30 1e3 ~ 2001-01-01 null 0x1F"),
        ("names: {0: off, 1: on}", "off on"),
        ('"names": {\'0\': cat, "1": dog}', "cat dog"),
        ("names:\n0: cat\n1: dog\nnc: 2", "cat dog"),
        ("names:\n- cat\n- dog", "cat dog"),
    ],
)
def test_class_names_are_read_as_text(tmp_path: Path, text: str, names: str) -> None:
    root = yolo_folder(tmp_path / "cells", "a")
    (root / "data.yaml").write_text(text)
    assert open_folder(root)[1].classes() == tuple(names.split(" "))


@pytest.mark.parametrize(
    "place", ["classes.txt", "labels/classes.txt", "labels/train/classes.txt", "images/train/Classes.TXT", "obj.names"]
)
def test_class_names_beside_the_labels(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    root = yolo_folder(tmp_path / "cells", "train/a", "val/b")
    assert open_folder(root)[1].classes() == ("0",) and "their numbers are used as names" in caplog.text
    (root / place).write_text("cat\ndog\n")
    assert open_folder(root)[1].classes() == ("cat", "dog")
    assert [len(record["annotations"]) for record in read_all(root, "yolo")] == [1, 1]
    (root / "labels/val/classes.txt").write_text("dog\ncat\n")
    if place.startswith(("labels/train", "images")):
        with pytest.raises(UserError, match=r"classes\.txt.* name different classes"):
            open_folder(root)
    else:  # the nearest to the root takes precedence
        assert open_folder(root)[1].classes() == ("cat", "dog")


DATA_YAML: dict[str, str] = {
    "folders": "train: images/one\nval: images/two",
    "from the folder itself": "path: .\ntrain: ./images/one/\nval: [images/two]",
    "moved up": "train: ../images/one\nval: ../../images/two",
    "moved": "path: /content/cells\ntrain: /content/cells/images/one\nval: C:\\cells\\images\\two",
    "a folder of data sets": "path: ../datasets/cells\ntrain: images/one\nval: images/two\ntest:",
    "synonyms of the keys": "train: images/one\nvalidation: images/two\ntest: ~",
    "lists": "train: one.txt\nval: lists/two.txt",
    "without its test set": "train: images/one\nval: images/two\ntest: ../test/images",
}


@pytest.mark.parametrize("kind", DATA_YAML)
@pytest.mark.parametrize("below", ["", "unpacked"])
def test_splits_of_data_yaml(tmp_path: Path, kind: str, below: str) -> None:
    """Independent of the names of the folders and of the former location of the data set."""
    root = yolo_folder(tmp_path / "cells" / below, "one/a", "one/b", "two/c", "test/d")
    (root / "lists").mkdir()
    (root / "one.txt").write_text("./images/one/a.png\n/content/cells/images/one/b.png\n")
    (root / "lists/two.txt").write_text("../images/two/c.png\n")
    (root / "data.yaml").write_text(f"names: [cat]\n{DATA_YAML[kind]}")
    folder = open_folder(tmp_path / "cells")[1]
    assert folder.classes() == ("cat",)
    assert stems(folder) == {"train": ["a", "b"], "val": ["c"]}
    assert len(folder.records("train", ("cat",), False)) == 2


SIBLINGS: dict[str, str] = {
    "custom_yolov5s.yaml": "nc: 1\nbackbone: [[-1, 1, Conv, [64, 6, 2, 2]]]\npath: elsewhere\n",
    "k8s.yaml": "kind: Pod\n---\nkind: Service\n",
    "mkdocs.yml": "site_name: cells\nnames: {a: b}\n",
    "params.yaml": "train: {epochs: 3}\nnc: 1\n",
    "also.yaml": "names: [dog]\ntrain: images/two\n",
}


@pytest.mark.parametrize("name", ["data.yaml", "Data.YML"])
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_other_yaml_files_do_not_change_data_yaml(tmp_path: Path, name: str, sibling: str) -> None:
    points = "0 0.5 0.5 0.4 0.4 0.1 0.2 0.3 0.4\n"
    root = yolo_folder(tmp_path / "cells", "one/a", "two/b", label=points)
    (root / sibling).write_text(SIBLINGS[sibling])
    splits = "train: images/one\nval: images/two\nkpt_shape: [2, 2]\n"
    (root / name).write_text(f"names: [cat]\n{splits}")
    for _ in range(2):
        folder = open_folder(root)[1]
        assert folder.classes() == ("cat",) and stems(folder) == {"train": ["a"], "val": ["b"]}
        assert "segmentation" not in folder.records("train", ("cat",), False)[0]["annotations"][0]
        if sibling == "also.yaml":
            return
        (root / name).write_text(splits)  # without names, which are now in a list
        (root / "classes.txt").write_text("cat\n")


def test_description_with_another_file_name(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "cells", "one/a", "two/b")
    (root / "cells.yaml").write_text("train: images/one\nval: images/two\n")
    (root / "custom_yolov5s.yaml").write_text(SIBLINGS["custom_yolov5s.yaml"])
    assert stems(open_folder(root)[1]) == {"train": ["a"], "val": ["b"]}
    (root / "more.yaml").write_text("train: images\n")
    with pytest.raises(UserError, match=r"cells\.yaml and .*more\.yaml may both describe the data set"):
        open_folder(root)
    (root / "more.yaml").write_text("names: [cat]\ntrain: images/two\nval: images/one\n")
    assert stems(open_folder(root)[1]) == {"train": ["b"], "val": ["a"]}  # names take precedence
    (root / "more.yaml").unlink()
    (root / "k8s.yaml").write_text(SIBLINGS["k8s.yaml"])
    with pytest.raises(UserError, match=r"k8s\.yaml is not valid YAML"):  # it may be the file with the names, damaged
        open_folder(root)
    (root / "classes.txt").write_text("cat\n")
    assert stems(open_folder(root)[1]) == {"train": ["a"], "val": ["b"]}


def test_equal_train_and_val_are_one_undivided_set(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "cells", "a", "b", "c")
    (root / "data.yaml").write_text("names: [cat]\ntrain: images\nval: images\n")
    assert stems(open_folder(root)[1]) == {"all": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: ../other/images\nval: images/two", "'train: ../other/images' .* leads to no image inside"),
        ("train: images/one\nval: /etc", "'val: /etc' .* leads to no image inside"),
        ("train: images/one\nval: {a: b}", "'val' .* set it to a path"),
        ("train: odd.txt", "names '../../secret.png', which is not an image inside"),
        ("train: missing.txt", r"images/one/z\.png is missing"),
        ("kpt_shape: [4]", "kpt_shape .* set it to"),
        ("kpt_shape: [4, 9]", "kpt_shape .* set it to"),
    ],
)
def test_invalid_data_yaml_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    root = yolo_folder(tmp_path / "cells", "one/a", "two/b")
    picture(tmp_path / "secret.png")
    (root / "odd.txt").write_text("../../secret.png\n")
    (root / "missing.txt").write_text("images/one/a.png\nimages/one/z.png\n")
    (root / "data.yaml").write_text(f"names: [cat]\n{text}\n")
    with pytest.raises(UserError, match=message) as caught:
        read_all(root, "yolo")
    assert "\n" not in str(caught.value)
    if "missing" in text:
        folder = open_folder(root)[1]
        assert [path.stem for path in folder.images(next(iter(folder.sets)), True)] == ["a"]
