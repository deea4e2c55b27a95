"""Custom data sets: detection of the format, config, registration, links, cache."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from detectron2.structures import BoxMode

from relvit_d2.data import cache
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import FORMATS, config_pairs, open_folder, register_custom
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import IMAGES, WRITERS, custom_keys, read_all, write_coco, write_voc


def test_every_format_has_a_writer() -> None:
    assert {form for form, _ in WRITERS.values()} == set(FORMATS)


@pytest.mark.parametrize("kind", WRITERS)
def test_format_is_detected(kind: str, tmp_path: Path) -> None:
    form, writer = WRITERS[kind]
    root = writer(tmp_path / "cells")
    found, folder = open_folder(root)
    assert found == form
    assert sorted(folder.sets) == ["train", "val"]
    assert folder.classes() == ("cat", "dog")
    for split in ("train", "val"):
        expected = [(name, objects) for name, part, objects in IMAGES if part == split]
        for _ in range(2):  # read, and from the cache
            records = open_folder(root)[1].records(split, ("cat", "dog"), False)
            assert [Path(record["file_name"]).stem for record in records] == [name for name, _ in expected]
            for record, (_, objects) in zip(records, expected, strict=True):
                assert (record["width"], record["height"]) == (40, 30)
                assert [annotation["category_id"] for annotation in record["annotations"]] == [
                    ("cat", "dog").index(name) for name, _ in objects
                ]
                for annotation, (_, box) in zip(record["annotations"], objects, strict=True):
                    assert annotation["bbox"] == pytest.approx(box)
                    assert (annotation["bbox_mode"], annotation["iscrowd"]) == (BoxMode.XYXY_ABS, 0)
        assert [Path(record["file_name"]) for record in records] == folder.images(split, False)
    assert len(read_all(root, form)) == 3
    assert len({record["image_id"] for record in read_all(root, form)}) == 3
    # Another list of classes renumbers, or lacks a class.
    if form != "coco":
        assert folder.records("val", ("dog", "cat"), False)[0]["annotations"][0]["category_id"] == 0
        with pytest.raises(UserError, match=r"'dog', which is not one of cat, dogs: correct .*; did you mean 'dogs'"):
            folder.records("val", ("cat", "dogs"), False)


@pytest.mark.parametrize("kind", WRITERS)
def test_data_option_gives_a_config_that_can_be_saved(kind: str, tmp_path: Path) -> None:
    form, writer = WRITERS[kind]
    pairs = config_pairs(str(writer(tmp_path / "My cells")), "detection")
    cfg = load_config("configs/demo/streets.yaml", [*pairs, "SEED", "3"], "detection")
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("my_cells_train",), ("my_cells_val",))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(str(tmp_path / "config.yaml"), [], "detection")
    assert again.DATASETS == cfg.DATASETS
    register_custom(again.DATASETS)
    register_custom(again.DATASETS)
    assert len(catalog.get_records("my_cells_train")) == 2
    assert len(catalog.get_records("my_cells_train[:1]")) == len(catalog.get_images("my_cells_train[:1]")) == 1
    assert catalog.get_metadata("my_cells_val").metrics == (("coco", "voc07") if form == "voc" else ("coco",))
    assert "DATASETS" in config_pairs(str(tmp_path / "My cells"), "pretrain")[0]


def test_a_folder_is_opened_once_for_all_its_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = WRITERS["yolo"][1](tmp_path / "cells")
    left_out = root / "images" / "more.png"
    shutil.copy(next(root.glob("images/train/*")), left_out)
    caplog.set_level("INFO")

    def log_lines() -> int:
        return sum("are left out" in message for message in caplog.messages)  # one each time the folder is opened

    cfg = load_config("configs/demo/streets.yaml", config_pairs(str(root), "detection"), "detection")
    register_custom(cfg.DATASETS)
    assert log_lines() == 1
    left_out.rename(root / "images/train/more.png")  # a later registration sees the files of its time
    register_custom(cfg.DATASETS)
    assert log_lines() == 1
    assert len(catalog.get_records("cells_train")) == 3


def test_json_and_images_keys(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "cells")
    keys = {"ROOT": str(root), "JSON": "annotations/val.json", "IMAGES": "images/val"}
    register_custom(custom_keys(named=keys))
    assert [record["image_id"] for record in catalog.get_records("named")] == [ord("c")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ROOT": "{root}", "SPLIT": "test"}, "has train, val: use one of them"),
        ({"ROOT": "{root}", "FORMAT": "pascal"}, "FORMAT 'pascal' is unknown"),
        ({"ROOT": "{root}", "FORMAT": "voc"}, "contains no labels that can be read"),
        ({"ROOT": "{root}", "CLASSES": ["dog", "cat"]}, "has the categories cat, dog, not dog, cat"),
        ({"ROOT": "{root}", "CLASSES": "cat"}, "CLASSES is 'cat': set it to a list"),
        ({"ROOT": "{root}", "JSON": "../x.json"}, "not a path inside"),
        ({"ROOT": "{root}", "JSON": "x.json", "FORMAT": "yolo"}, "remove one"),
        ({"ROOT": 3}, "ROOT is 3: set it to text"),
        ({}, "has no ROOT"),
    ],
)
def test_invalid_keys_are_errors(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    root = write_coco(tmp_path / "cells")
    given = {key: value.format(root=root) if isinstance(value, str) else value for key, value in keys.items()}
    with pytest.raises(UserError) as caught:
        register_custom(custom_keys(bad={"SPLIT": "train"} | given if "SPLIT" not in given and given else given))
        catalog.get_records("bad")
    assert message in str(caught.value)


def test_data_without_a_training_split_are_refused(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "cells")
    (root / "annotations/train.json").rename(root / "annotations/second.json")
    with pytest.raises(UserError, match=r"has the sets second, val, of which none is for training"):
        config_pairs(str(root), "detection")


def test_two_voc_layouts_are_ambiguous(tmp_path: Path) -> None:
    for name in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / "VOCdevkit" / name)
    with pytest.raises(UserError, match=r"VOC2007' and .*VOC2012' are both data sets in VOC's layout: use one of them"):
        open_folder(tmp_path / "VOCdevkit")
    # the folder's own lists take precedence over those below it
    assert len(read_all(write_voc(tmp_path / "VOCdevkit/VOC2007/other").parent, "voc")) == 3


def test_builtin_names_are_not_replaced(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "streets")
    assert config_pairs(str(root), "detection")[3] == ("custom_streets_train",)
    with pytest.raises(UserError, match="'streets_train' is a data set already"):
        register_custom(custom_keys(streets_train={"ROOT": str(root), "SPLIT": "train"}))


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_links_out_of_the_root_are_refused(kind: str, tmp_path: Path) -> None:
    root = WRITERS[kind][1](tmp_path / "cells")
    for name, ending in (("c", ".png"), ("a", (".xml" if kind == "voc" else ".txt"))):
        path = next(root.rglob(f"{name}{ending}"))
        shutil.copy(path, tmp_path / f"outside{ending}")
        path.unlink()
        path.symlink_to(tmp_path / f"outside{ending}")
        with pytest.raises(UserError, match="leads out of"):
            read_all(root, kind)
        path.unlink()
        shutil.copy(tmp_path / f"outside{ending}", path)
    assert len(read_all(root, kind)) == 3


@pytest.mark.parametrize("kind", WRITERS)
def test_linked_folders_are_errors(kind: str, tmp_path: Path) -> None:
    """Whichever folder is a link: images, labels, a split."""
    count = len([path for path in WRITERS[kind][1](tmp_path / "any").rglob("*") if path.is_dir()])
    for place in range(count):
        root = WRITERS[kind][1](tmp_path / f"cells {place}")
        folder = sorted(path for path in root.rglob("*") if path.is_dir())[place]
        folder.rename(tmp_path / f"disk {place}")
        folder.symlink_to(tmp_path / f"disk {place}")
        with pytest.raises(UserError, match="leads out of the data set") as caught:
            open_folder(root)
        assert f"'{folder}'" in str(caught.value)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/raw").mkdir()
    (tmp_path / "links/images").symlink_to("raw")
    with pytest.raises(UserError, match=r"links to folders are not followed .*links/images"):
        open_folder(tmp_path / "links")


def test_json_without_categories_is_an_error(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "cells")
    for path in (root / "annotations").iterdir():
        document = json.loads(path.read_text())
        del document["categories"]
        path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"train\.json.* has images and annotations but no categories"):
        open_folder(root)


def test_linked_folder_of_image_lists_is_refused(tmp_path: Path) -> None:
    root = WRITERS["voc"][1](tmp_path / "cells")
    lists = next(root.rglob("ImageSets"))
    lists.rename(tmp_path / "lists")
    lists.symlink_to(tmp_path / "lists")
    with pytest.raises(UserError, match="leads out of"):
        open_folder(root)


def test_real_voc_sample(samples: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = samples / "bccd/BCCD"
    form, folder = open_folder(root)
    assert (form, folder.classes()) == ("voc", ("Platelets", "RBC", "WBC"))
    assert {split: len(folder.images(split, False)) for split in folder.sets} == {
        "train": 9,
        "val": 5,
        "trainval": 14,
        "test": 6,
    }
    assert "2 of the 349 boxes" in caplog.text
    assert "BloodImage_00338.xml, object" in caplog.text
    assert "BloodImage_00343.xml, object" in caplog.text
    caplog.clear()
    cache._logged.clear()
    open_folder(root)[1].classes()
    assert "2 of the 349 boxes" in caplog.text  # also when the records come from the cache


def test_cache_is_updated_after_a_change(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "cells")
    before = open_folder(root)[1].records("train", ("cat", "dog"), False)
    assert open_folder(root)[1].records("train", ("cat", "dog"), False) == before
    (path,) = (tmp_path / "cache/relvit_d2/records").glob("*.json")
    # An image that could not be read at that time.
    document = json.loads(path.read_text())
    document["records"][0] |= {"width": 0, "height": 0, "annotations": []}
    path.write_text(json.dumps(document))
    assert open_folder(root)[1].records("train", ("cat", "dog"), False) == before
    # Change the cache to show that it is read.
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    assert open_folder(root)[1].classes() == ("cow", "dog")
    annotation = root / "Annotations/a.xml"
    state = annotation.stat()
    annotation.write_text(annotation.read_text().replace("<xmin>5", "<xmin>6"))
    os.utime(annotation, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = open_folder(root)[1].records("train", ("cat", "dog"), False)
    assert after[0]["annotations"][0]["bbox"] == [5, 6, 20, 24]
    for damaged in ("", "{}", path.read_text()[:200]):
        path.write_text(damaged)
        assert open_folder(root)[1].records("train", ("cat", "dog"), False) == after


def test_records_without_a_cache_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_voc(tmp_path / "cells")
    first = open_folder(root)[1].records("train", ("cat", "dog"), False)
    (tmp_path / "file").write_text("a file instead of the cache folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_folder(root)[1].records("train", ("cat", "dog"), False) == first


def test_missing_images(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "cells")
    (root / "JPEGImages/a.png").unlink()
    for read in (
        lambda skip: open_folder(root)[1].images("train", skip),
        lambda skip: open_folder(root)[1].records("train", ("cat", "dog"), skip),
    ):
        with pytest.raises(UserError, match=r"no image for the annotation .*a\.xml"):
            read(False)
        assert len(read(True)) == 1


def test_a_data_set_of_test_images_alone_is_not_trained_on(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "cells")
    (root / "annotations/val.json").unlink()
    (root / "annotations/train.json").rename(root / "annotations/test.json")
    with pytest.raises(UserError, match="has the sets test, of which none is for training: rename one to train"):
        config_pairs(str(root), "detection")
