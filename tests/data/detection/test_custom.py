"""A user's own data: told by looking, divided, read, cached."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.structures import BoxMode
from fvcore.common.config import CfgNode
from PIL import Image

from relvit_d2.data import cache
from relvit_d2.data.detection import catalog, yolo
from relvit_d2.data.detection.coco import load_coco
from relvit_d2.data.detection.custom import FORMATS, READERS, config_pairs, look, register_own
from relvit_d2.data.detection.splits import split_of, splits_of_folders
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.scripts import fails, run

XML = """<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>
<ymax>{box[3]}</ymax></bndbox></object>"""
# What every written folder holds: name, split, and objects as class and box on an image of 40 x 30 pixels.
IMAGES: tuple[tuple[str, str, list[tuple[str, list[int]]]], ...] = (
    ("a", "train", [("cat", [4, 6, 20, 24]), ("dog", [0, 0, 40, 30])]),
    ("b", "train", []),
    ("c", "val", [("dog", [10, 3, 30, 15])]),
)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_told", set())
    yolo._warn_of_numbers.cache_clear()


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 30), Image.Resampling.BICUBIC).save(path)


def write_coco(root: Path) -> Path:
    for split in ("train", "val"):
        document: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 7, "name": "dog"}, {"id": 1, "name": "cat"}],
        }
        for name, part, objects in IMAGES:
            if part == split:
                picture(root / f"images/{split}/{name}.png")
                document["images"].append({"id": ord(name), "file_name": f"{name}.png", "width": 40, "height": 30})
                for kind, (x0, y0, x1, y1) in objects:
                    thing = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": {"dog": 7, "cat": 1}[kind]}
                    thing |= {"id": len(document["annotations"]), "image_id": ord(name)}
                    document["annotations"].append(thing)
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/{split}.json").write_text(json.dumps(document))
    return root


def write_split_first_coco(root: Path) -> Path:
    """The splits as folders, each with its annotation file among its images."""
    write_coco(root)
    for split, name in (("train", "train"), ("val", "valid")):
        (root / f"images/{split}").rename(root / name)
        (root / f"annotations/{split}.json").rename(root / name / "_annotations.coco.json")
    return root


def xml(objects: list[tuple[str, list[int]]], size: tuple[int, int] = (40, 30)) -> str:
    one_based = [(name, [box[0] + 1, box[1] + 1, *box[2:]]) for name, box in objects]
    return XML.format(size=size, objects="".join(OBJECT.format(name=name, box=box) for name, box in one_based))


def write_voc(root: Path) -> Path:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, split, objects in IMAGES:
        picture(root / f"JPEGImages/{name}.png")
        (root / f"Annotations/{name}.xml").write_text(xml(objects))
        with (root / f"ImageSets/Main/{split}.txt").open("a") as file:
            file.write(f"{name}\n")
    return root


def write_deeper_voc(root: Path) -> Path:
    """The layout not in the folder itself but in one below, as archives unpack."""
    write_voc(root / "VOC2007")
    return root


def write_flat_voc(root: Path) -> Path:
    """XML beside the images, in folders of the splits, and without sizes."""
    for name, split, objects in IMAGES:
        picture(root / f"{split}/{name}.png")
        (root / f"{split}/{name}.xml").write_text(xml(objects, (0, 0)))
    return root


def yolo_lines(objects: list[tuple[str, list[int]]], numbers: dict[str, int]) -> str:
    lines = []
    for kind, (x0, y0, x1, y1) in objects:
        values = ((x0 + x1) / 80, (y0 + y1) / 60, (x1 - x0) / 40, (y1 - y0) / 30)
        lines.append(" ".join(map(str, (numbers[kind], *values))))
    return "\n".join(lines)


def write_yolo(root: Path) -> Path:
    for name, split, objects in IMAGES:
        picture(root / f"images/{split}/{name}.png")
        (root / f"labels/{split}").mkdir(parents=True, exist_ok=True)
        if objects:  # an image without objects has no file
            (root / f"labels/{split}/{name}.txt").write_text(yolo_lines(objects, {"cat": 0, "dog": 1}))
    (root / "data.yaml").write_text(
        "path: /no/such\ntrain: ../images/train\nval: /no/such/images/val\nnames: [cat, dog]\n"
    )
    return root


def write_split_first_yolo(root: Path) -> Path:
    """The splits above the folders of images and labels, ids with a gap, names by number."""
    for name, split, objects in IMAGES:
        picture(root / f"{split}/images/{name}.png")
        (root / f"{split}/labels").mkdir(parents=True, exist_ok=True)
        (root / f"{split}/labels/{name}.txt").write_text(yolo_lines(objects, {"cat": 3, "dog": 12}))
    (root / "data.yaml").write_text("names: {12: dog, 3: cat}\n")
    return root


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "coco": ("coco", write_coco),
    "coco by split": ("coco", write_split_first_coco),
    "voc": ("voc", write_voc),
    "voc one folder deeper": ("voc", write_deeper_voc),
    "voc beside the images": ("voc", write_flat_voc),
    "yolo": ("yolo", write_yolo),
    "yolo by split": ("yolo", write_split_first_yolo),
}


def test_every_format_is_written_here() -> None:
    assert {form for form, _ in WRITERS.values()} == set(FORMATS) == set(READERS)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_is_told_by_looking(kind: str, tmp_path: Path) -> None:
    form, writer = WRITERS[kind]
    root = writer(tmp_path / "own")
    found, folder = look(root)
    assert found == form
    assert sorted(folder.sets) == ["train", "val"]
    assert folder.classes() == ("cat", "dog")
    for split in ("train", "val"):
        wanted = [(name, objects) for name, part, objects in IMAGES if part == split]
        for _ in range(2):  # read, and from the cache
            records = look(root)[1].records(split, ("cat", "dog"), False)
            assert [Path(record["file_name"]).stem for record in records] == [name for name, _ in wanted]
            for record, (_, objects) in zip(records, wanted, strict=True):
                assert (record["width"], record["height"]) == (40, 30)
                assert [thing["category_id"] for thing in record["annotations"]] == [
                    ("cat", "dog").index(name) for name, _ in objects
                ]
                for thing, (_, box) in zip(record["annotations"], objects, strict=True):
                    assert thing["bbox"] == pytest.approx(box)
                    assert (thing["bbox_mode"], thing["iscrowd"]) == (BoxMode.XYXY_ABS, 0)
        assert [Path(record["file_name"]) for record in records] == folder.images(split, False)
    assert len(READERS[form](root)) == 3
    assert len({record["image_id"] for record in READERS[form](root)}) == 3
    # Other class lists renumber, or name what they lack.
    if form != "coco":
        assert folder.records("val", ("dog", "cat"), False)[0]["annotations"][0]["category_id"] == 0
        with pytest.raises(UserError, match="of the class 'dog', which is not one of cat, dogs; did you mean 'dogs'"):
            folder.records("val", ("cat", "dogs"), False)


@pytest.mark.parametrize("kind", WRITERS)
def test_data_becomes_a_config_that_can_be_kept(kind: str, tmp_path: Path) -> None:
    form, writer = WRITERS[kind]
    pairs = config_pairs(str(writer(tmp_path / "My cells")), "detection")
    cfg = load_config("configs/demo/streets.yaml", [*pairs, "SEED", "3"], "detection")
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("my_cells_train",), ("my_cells_val",))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(str(tmp_path / "config.yaml"), [], "detection")
    assert again.DATASETS == cfg.DATASETS
    register_own(again.DATASETS)
    register_own(again.DATASETS)
    assert len(catalog.get_records("my_cells_train")) == 2
    assert len(catalog.get_records("my_cells_train[:1]")) == len(catalog.get_images("my_cells_train[:1]")) == 1
    assert catalog.get_metadata("my_cells_val").metrics == (("coco", "voc07") if form == "voc" else ("coco",))
    assert "DATASETS" in config_pairs(str(tmp_path / "My cells"), "pretrain")[0]


def own(**sets: dict[str, Any]) -> CfgNode:
    names = tuple(sets)
    return load_config("configs/demo/streets.yaml", ["DATASETS.CUSTOM", sets, "DATASETS.TRAIN", names]).DATASETS  # type: ignore[list-item]


def test_one_set_is_divided_the_same_way_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "own"
    for number in range(50):
        picture(root / f"{number}.png", number)
        (root / f"{number}.xml").write_text(xml([("cat", [4, 6, 20, 24])]))
    caplog.set_level("INFO")
    register_own(own(cut_train={"ROOT": str(root), "SPLIT": "train"}, cut_val={"ROOT": str(root), "SPLIT": "val"}))
    register_own(own(cut_all={"ROOT": str(root)}))
    assert "one in 5 held out" in caplog.text
    train, val, whole = (catalog.get_records(f"cut_{name}") for name in ("train", "val", "all"))
    assert (len(train), len(val)) == (40, 10)
    assert sorted(map(str, train + val)) == sorted(map(str, whole))
    for name, records in (("cut_train", train), ("cut_val", val)):
        assert catalog.get_images(name) == [Path(record["file_name"]) for record in records]
    # Copies under other names, in another format and quality, come to the side of their originals.
    for number in range(50):
        image = Image.open(root / f"{number}.png").resize((80, 60), Image.Resampling.BICUBIC)
        image.save(root / f"a copy of {number}.jpg", quality=80)
        (root / f"a copy of {number}.xml").write_text(xml([("cat", [4, 6, 20, 24])], (80, 60)))
    register_own(own(cut_val={"ROOT": str(root), "SPLIT": "val"}))
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
def test_names_say_the_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_json_and_images_can_be_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "own")
    keys = {"ROOT": str(root), "JSON": "annotations/val.json", "IMAGES": "images/val"}
    register_own(own(named=keys))
    assert [record["image_id"] for record in catalog.get_records("named")] == [ord("c")]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"ROOT": "{root}", "SPLIT": "test"}, "has train, val: give one of them"),
        ({"ROOT": "{root}", "FORMAT": "pascal"}, "FORMAT 'pascal' is unknown"),
        ({"ROOT": "{root}", "FORMAT": "voc"}, "holds no labels that can be read"),
        ({"ROOT": "{root}", "CLASSES": ["dog", "cat"]}, "has the categories cat, dog, not dog, cat"),
        ({"ROOT": "{root}", "CLASSES": "cat"}, "CLASSES is 'cat': give a list"),
        ({"ROOT": "{root}", "JSON": "../x.json"}, "no path inside"),
        ({"ROOT": "{root}", "JSON": "x.json", "FORMAT": "yolo"}, "leave one out"),
        ({"ROOT": 3}, "ROOT is 3: give text"),
        ({}, "has no ROOT"),
    ],
)
def test_bad_keys_are_one_sentence(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    root = write_coco(tmp_path / "own")
    given = {key: value.format(root=root) if isinstance(value, str) else value for key, value in keys.items()}
    with pytest.raises(UserError) as caught:
        register_own(own(bad={"SPLIT": "train"} | given if "SPLIT" not in given and given else given))
        catalog.get_records("bad")
    assert says in str(caught.value)


def test_data_without_a_training_set_are_refused(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "own")
    (root / "annotations/train.json").rename(root / "annotations/second.json")
    with pytest.raises(UserError, match=r"has the sets second, val, of which none is for training"):
        config_pairs(str(root), "detection")


def test_of_two_voc_layouts_one_must_be_named(tmp_path: Path) -> None:
    for name in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / "VOCdevkit" / name)
    with pytest.raises(
        UserError, match=r"VOC2007' and .*VOC2012' are both data sets in VOC's layout: give one of them"
    ):
        look(tmp_path / "VOCdevkit")
    assert len(READERS["voc"](write_voc(tmp_path / "VOCdevkit/VOC2007/other").parent)) == 3  # its own lists go first


def test_a_name_of_the_package_stays_what_it_is(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "streets")
    assert config_pairs(str(root), "detection")[3] == ("own_streets_train",)
    with pytest.raises(UserError, match="'streets_train' is a data set already"):
        register_own(own(streets_train={"ROOT": str(root), "SPLIT": "train"}))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("x 0.5 0.5 0.1 0.1", "begins with 'x'"),
        ("2 0.5 0.5 0.1 0.1", "of the class 2, but the names of classes are for 0, 1"),
        ("-1 0.5 0.5 0.1 0.1", "begins with '-1'"),
        ("0 0.5 0.5 0.1", "3 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "5 numbers"),
        ("0 0.5 0.5 0.1 wide", "no number"),
        ("0 nan 0.5 0.1 0.1", "not finite"),
        ("0 0.5 0.5 1e999 0.1", "not finite"),
        ("0 0.5 0.5 -0.1 0.1", "negative"),
        ("0 320 240 30 30", "outside its image"),
    ],
)
def test_bad_yolo_line_is_one_sentence(tmp_path: Path, line: str, says: str) -> None:
    root = write_yolo(tmp_path / "own")
    (root / "labels/val/c.txt").write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=r"c\.txt, line 2") as caught:
        look(root)[1].records("val", ("cat", "dog"), False)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["names: [a, a]", "names: 3", "names: {x: y}", "names: [[1]]", "a: *b", "[" * 800])
def test_bad_names_are_one_sentence(tmp_path: Path, text: str) -> None:
    root = write_yolo(tmp_path / "own")
    (root / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=r"data\.yaml"):
        look(root)[1].classes()


def test_yolo_polygons_are_masks_and_classes_may_have_no_names(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "own")
    (root / "data.yaml").unlink()
    (root / "labels/val/c.txt").write_text("5 0.25 0.2 0.5 0.2 0.25 0.8\n")
    folder = look(root)[1]
    assert folder.classes() == ("0", "1", "5")
    (thing,) = folder.records("val", folder.classes(), False)[0]["annotations"]
    assert thing["segmentation"] == [pytest.approx([10, 6, 20, 6, 10, 24])]
    assert (thing["bbox"], thing["category_id"]) == (pytest.approx([10, 6, 20, 24]), 2)


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_no_link_leads_out_of_the_root(kind: str, tmp_path: Path) -> None:
    root = WRITERS[kind][1](tmp_path / "own")
    for name, ending in (("c", ".png"), ("a", (".xml" if kind == "voc" else ".txt"))):
        path = next(root.rglob(f"{name}{ending}"))
        shutil.copy(path, tmp_path / f"outside{ending}")
        path.unlink()
        path.symlink_to(tmp_path / f"outside{ending}")
        with pytest.raises(UserError, match="leads out of"):
            READERS[kind](root)
        path.unlink()
        shutil.copy(tmp_path / f"outside{ending}", path)
    assert len(READERS[kind](root)) == 3


@pytest.mark.parametrize("kind", WRITERS)
def test_a_linked_folder_is_named(kind: str, tmp_path: Path) -> None:
    """Whichever folder lies elsewhere: images, labels, a split."""
    count = len([path for path in WRITERS[kind][1](tmp_path / "any").rglob("*") if path.is_dir()])
    for place in range(count):
        root = WRITERS[kind][1](tmp_path / f"own {place}")
        folder = sorted(path for path in root.rglob("*") if path.is_dir())[place]
        folder.rename(tmp_path / f"disk {place}")
        folder.symlink_to(tmp_path / f"disk {place}")
        with pytest.raises(UserError, match="leads out of the data") as caught:
            look(root)
        assert f"'{folder}'" in str(caught.value)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/raw").mkdir()
    (tmp_path / "links/images").symlink_to("raw")
    with pytest.raises(UserError, match=r"links to folders are not followed, such as .*links/images"):
        look(tmp_path / "links")


def yolo_folder(root: Path, *names: str, label: str = "0 0.5 0.5 0.4 0.4\n") -> Path:
    """Images with labels by their paths below ``images``."""
    for number, name in enumerate(names):
        picture(root / f"images/{name}.png", number)
        path = root / f"labels/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(label)
    return root


def stems(folder: Any) -> dict[str, list[str]]:
    return {split: sorted(path.stem for path in folder.images(split, False)) for split in sorted(folder.sets)}


@pytest.mark.parametrize("number", ["3", "3.0", "3.", "0.300e+01", "3E0", "+3", "0003", "30e-1"])
def test_class_numbers_in_any_notation(tmp_path: Path, number: str) -> None:
    root = yolo_folder(tmp_path / "own", "a", "b", label=f"{number} 0.5 0.5 0.4 0.4\n")
    assert look(root)[1].classes() == ("3",)
    (root / "data.yaml").write_text(f"names: {{{number}: cat}}")
    assert look(root)[1].classes() == ("cat",)
    assert [len(record["annotations"]) for record in READERS["yolo"](root)] == [1, 1]


@pytest.mark.parametrize("text", ["3.5", "-3", "1e3000", "nan", "0x3", "3_0", "٣", "1e", "."])
def test_what_is_not_a_class_number(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="must begin with the number of a class"):
        look(yolo_folder(tmp_path / "own", "a", label=f"{text} 0.5 0.5 0.4 0.4\n"))[1].classes()


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
def test_names_are_read_as_they_are_written(tmp_path: Path, text: str, names: str) -> None:
    root = yolo_folder(tmp_path / "own", "a")
    (root / "data.yaml").write_text(text)
    assert look(root)[1].classes() == tuple(names.split(" "))


@pytest.mark.parametrize(
    "place", ["classes.txt", "labels/classes.txt", "labels/train/classes.txt", "images/train/Classes.TXT", "obj.names"]
)
def test_names_beside_the_labels(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    root = yolo_folder(tmp_path / "own", "train/a", "val/b")
    assert look(root)[1].classes() == ("0",) and "their numbers serve as names" in caplog.text
    (root / place).write_text("cat\ndog\n")
    assert look(root)[1].classes() == ("cat", "dog")
    assert [len(record["annotations"]) for record in READERS["yolo"](root)] == [1, 1]
    (root / "labels/val/classes.txt").write_text("dog\ncat\n")
    if place.startswith(("labels/train", "images")):
        with pytest.raises(UserError, match=r"classes\.txt.* name different classes"):
            look(root)
    else:  # the nearest to the root counts
        assert look(root)[1].classes() == ("cat", "dog")


DATA_YAML: dict[str, str] = {
    "folders": "train: images/one\nval: images/two",
    "from the folder itself": "path: .\ntrain: ./images/one/\nval: [images/two]",
    "moved up": "train: ../images/one\nval: ../../images/two",
    "moved": "path: /content/cells\ntrain: /content/cells/images/one\nval: C:\\cells\\images\\two",
    "a folder of data sets": "path: ../datasets/cells\ntrain: images/one\nval: images/two\ntest:",
    "other words": "train: images/one\nvalidation: images/two\ntest: ~",
    "lists": "train: one.txt\nval: lists/two.txt",
    "without its test set": "train: images/one\nval: images/two\ntest: ../test/images",
}


@pytest.mark.parametrize("kind", DATA_YAML)
@pytest.mark.parametrize("below", ["", "unpacked"])
def test_the_splits_of_data_yaml_are_followed(tmp_path: Path, kind: str, below: str) -> None:
    """Whatever the folders are called, and wherever the data set lay before."""
    root = yolo_folder(tmp_path / "own" / below, "one/a", "one/b", "two/c", "test/d")
    (root / "lists").mkdir()
    (root / "one.txt").write_text("./images/one/a.png\n/content/cells/images/one/b.png\n")
    (root / "lists/two.txt").write_text("../images/two/c.png\n")
    (root / "data.yaml").write_text(f"names: [cat]\n{DATA_YAML[kind]}")
    folder = look(tmp_path / "own")[1]
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
def test_no_yaml_file_beside_data_yaml_changes_what_it_gives(tmp_path: Path, name: str, sibling: str) -> None:
    points = "0 0.5 0.5 0.4 0.4 0.1 0.2 0.3 0.4\n"
    root = yolo_folder(tmp_path / "own", "one/a", "two/b", label=points)
    (root / sibling).write_text(SIBLINGS[sibling])
    splits = "train: images/one\nval: images/two\nkpt_shape: [2, 2]\n"
    (root / name).write_text(f"names: [cat]\n{splits}")
    for _ in range(2):
        folder = look(root)[1]
        assert folder.classes() == ("cat",) and stems(folder) == {"train": ["a"], "val": ["b"]}
        assert "segmentation" not in folder.records("train", ("cat",), False)[0]["annotations"][0]
        if sibling == "also.yaml":
            return
        (root / name).write_text(splits)  # without names, which come from a list now
        (root / "classes.txt").write_text("cat\n")


def test_a_description_with_a_name_of_its_own(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own", "one/a", "two/b")
    (root / "cells.yaml").write_text("train: images/one\nval: images/two\n")
    (root / "custom_yolov5s.yaml").write_text(SIBLINGS["custom_yolov5s.yaml"])
    assert stems(look(root)[1]) == {"train": ["a"], "val": ["b"]}
    (root / "more.yaml").write_text("train: images\n")
    with pytest.raises(UserError, match=r"cells\.yaml and .*more\.yaml may both describe the data set"):
        look(root)
    (root / "more.yaml").write_text("names: [cat]\ntrain: images/two\nval: images/one\n")
    assert stems(look(root)[1]) == {"train": ["b"], "val": ["a"]}  # names decide
    (root / "more.yaml").unlink()
    (root / "k8s.yaml").write_text(SIBLINGS["k8s.yaml"])
    with pytest.raises(UserError, match=r"k8s\.yaml is not sound YAML"):  # it may be the damaged one with the names
        look(root)
    (root / "classes.txt").write_text("cat\n")
    assert stems(look(root)[1]) == {"train": ["a"], "val": ["b"]}


def test_train_and_val_of_one_folder_are_an_undivided_one(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own", "a", "b", "c")
    (root / "data.yaml").write_text("names: [cat]\ntrain: images\nval: images\n")
    assert stems(look(root)[1]) == {"all": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: ../other/images\nval: images/two", "'train: ../other/images' .* leads to no image inside"),
        ("train: images/one\nval: /etc", "'val: /etc' .* leads to no image inside"),
        ("train: images/one\nval: {a: b}", "'val' .* give a path"),
        ("train: odd.txt", "names '../../secret.png', which is not an image inside"),
        ("train: missing.txt", r"images/one/z\.png is missing"),
        ("kpt_shape: [4]", "kpt_shape .* give"),
        ("kpt_shape: [4, 9]", "kpt_shape .* give"),
    ],
)
def test_what_data_yaml_says_wrong_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    root = yolo_folder(tmp_path / "own", "one/a", "two/b")
    picture(tmp_path / "secret.png")
    (root / "odd.txt").write_text("../../secret.png\n")
    (root / "missing.txt").write_text("images/one/a.png\nimages/one/z.png\n")
    (root / "data.yaml").write_text(f"names: [cat]\n{text}\n")
    with pytest.raises(UserError, match=says) as caught:
        READERS["yolo"](root)
    assert "\n" not in str(caught.value)
    if "missing" in text:
        folder = look(root)[1]
        assert [path.stem for path in folder.images(next(iter(folder.sets)), True)] == ["a"]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_keypoints_are_not_corners(tmp_path: Path, dimensions: int) -> None:
    points = " 0.9" * (4 * dimensions)
    root = yolo_folder(tmp_path / "own", "a", label=f"0 0.5 0.5 0.4 0.4{points}\n0 0.5 0.5 0.2 0.2\n")
    (root / "data.yaml").write_text(f"names: [cat]\nkpt_shape: [4, {dimensions}]\n")
    (record,) = READERS["yolo"](root)
    assert [thing["bbox"] for thing in record["annotations"]] == [
        pytest.approx([12, 9, 28, 21]),
        pytest.approx([16, 12, 24, 18]),
    ]
    assert all("segmentation" not in thing for thing in record["annotations"])
    (root / "labels/a.txt").write_text("0 0.1 0.1 0.9 0.1 0.5 0.8\n")
    with pytest.raises(UserError, match=r"a\.txt, line 1 has 6 numbers behind the class: with the kpt_shape"):
        READERS["yolo"](root)


def test_labels_are_found_behind_many_images_without(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own", "train/a", "val/b")
    picture(root / "images/test/0.png")
    for number in range(1, 1100):
        (root / f"images/test/{number}.png").hardlink_to(root / "images/test/0.png")
    assert stems(look(root)[1]) == {"train": ["a"], "val": ["b"]}  # a test set without labels is none


def test_names_in_any_capitals_and_normal_form(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own", "train/é", "train/b", "val/c")
    (root / "labels/train/b.txt").rename(root / "labels/train/b.TXT")
    (root / "labels/train/é.txt").rename(root / "labels/train/e\u0301.txt")
    for name in ("images", "labels"):
        (root / name).rename(root / name.title())
    assert [len(record["annotations"]) for record in READERS["yolo"](root)] == [1, 1, 1]
    root = write_coco(tmp_path / "coco")
    (root / "annotations/train.json").rename(root / "annotations/Train.JSON")
    assert sorted(look(root)[1].sets) == ["train", "val"]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("images/train/test_site", "images/train", "images/val"), ("train", "train", "val")),
        (("train_set/images/train", "train_set/images/val"), ("train", "val")),  # what all have in common says nothing
        (("a_test/images/train", "b_test/images/val"), ("train", "val")),
        (("train2017", "val2017/night"), ("train", "val")),
        (("train/val", "valid/train"), ("train", "val")),
        (("train",), (None,)),
        (("a", "b"), (None, None)),
        ((), ()),
    ],
)
def test_the_outermost_folder_decides(folders: tuple[str, ...], expected: tuple[str | None, ...]) -> None:
    assert splits_of_folders([folder.split("/") for folder in folders]) == list(expected)


def test_a_folder_below_a_split_belongs_to_it_in_every_format(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "yolo", "train/test_site/a", "train/b", "val/c")
    assert stems(look(root)[1]) == {"train": ["a", "b"], "val": ["c"]}
    root = write_flat_voc(tmp_path / "voc")
    (root / "train").rename(root / "site")
    (root / "train").mkdir()
    (root / "site").rename(root / "train/test_site")
    assert stems(look(root)[1]) == {"train": ["a", "b"], "val": ["c"]}
    root = write_split_first_coco(tmp_path / "coco")
    (root / "train").rename(root / "site")
    (root / "train").mkdir()
    (root / "site").rename(root / "train/test_site")
    assert stems(look(root)[1]) == {"train": ["a", "b"], "val": ["c"]}


def test_a_json_without_categories_is_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "own")
    for path in (root / "annotations").iterdir():
        document = json.loads(path.read_text())
        del document["categories"]
        path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"train\.json.* has images and annotations but no categories"):
        look(root)


def test_no_link_to_labels_is_followed_to_find_the_classes(tmp_path: Path) -> None:
    """Classes without names are those of the labels, which are read before any record is."""
    root = write_yolo(tmp_path / "own")
    (root / "data.yaml").unlink()
    label = next(root.rglob("a.txt"))
    label.rename(tmp_path / "outside.txt")
    label.symlink_to(tmp_path / "outside.txt")
    with pytest.raises(UserError, match="leads out of"):
        look(root)[1].classes()


def test_no_folder_of_lists_outside_the_root_is_read(tmp_path: Path) -> None:
    root = WRITERS["voc"][1](tmp_path / "own")
    lists = next(root.rglob("ImageSets"))
    lists.rename(tmp_path / "lists")
    lists.symlink_to(tmp_path / "lists")
    with pytest.raises(UserError, match="leads out of"):
        look(root)


def test_real_cells(samples: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = samples / "bccd/BCCD"
    form, folder = look(root)
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
    cache._told.clear()
    look(root)[1].classes()
    assert "2 of the 349 boxes" in caplog.text  # though the cache was read


def test_the_cache_is_coco_and_notices_a_change(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "own")
    before = look(root)[1].records("train", ("cat", "dog"), False)
    (path,) = (tmp_path / "cache/relvit_d2/records").glob("*.json")
    by_name = {record["file_name"]: record for record in load_coco(path, root)}
    for record in before:
        assert by_name[record["file_name"]]["annotations"] == [
            {key: value for key, value in thing.items() if key != "difficult"} for thing in record["annotations"]
        ]
    # Read from the cache, not from the files: what it says there is what comes.
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    assert look(root)[1].classes() == ("cow", "dog")
    annotation = root / "Annotations/a.xml"
    state = annotation.stat()
    annotation.write_text(annotation.read_text().replace("<xmin>5", "<xmin>6"))
    os.utime(annotation, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = look(root)[1].records("train", ("cat", "dog"), False)
    assert after[0]["annotations"][0]["bbox"] == [5, 6, 20, 24]
    for damaged in ("", "{}", path.read_text()[:200]):
        path.write_text(damaged)
        assert look(root)[1].records("train", ("cat", "dog"), False) == after


def test_without_a_cache_the_records_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_yolo(tmp_path / "own")
    first = look(root)[1].records("train", ("cat", "dog"), False)
    (tmp_path / "file").write_text("a file where the cache should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert look(root)[1].records("train", ("cat", "dog"), False) == first


def test_missing_images_of_own_data(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "own")
    (root / "JPEGImages/a.png").unlink()
    for read in (
        lambda skip: look(root)[1].images("train", skip),
        lambda skip: look(root)[1].records("train", ("cat", "dog"), skip),
    ):
        with pytest.raises(UserError, match=r"no image for the annotation .*a\.xml"):
            read(False)
        assert len(read(True)) == 1


TINY = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 1)


def test_train_evaluate_and_pretrain_on_own_data(tmp_path: Path) -> None:
    """With masks, and images without objects where they are asked for."""
    root = write_yolo(tmp_path / "own")
    (root / "labels/train/a.txt").write_text("0 0.1 0.1 0.9 0.1 0.1 0.9\n1 0.3 0.3 0.6 0.3 0.3 0.6\n")
    (root / "labels/val/c.txt").write_text("0 0.1 0.1 0.9 0.1 0.1 0.9\n")
    flags = ("--config-file", "configs/demo/streets.yaml")
    masks = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    empty = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
    output = tmp_path / "my 1'st run"
    done = run(tmp_path, "train_net.py", *flags, "--data", root, *TINY, *masks, *empty, "OUTPUT_DIR", output)
    (following,) = re.findall("^next +(relvit-d2 .+)", done.stdout, re.MULTILINE)
    words = [str(root / "images") if word == "IMAGES" else word for word in shlex.split(following)]
    run(tmp_path, *words, "--output", tmp_path / "found")
    assert (tmp_path / "found/detections.json").is_file()
    assert "classes cat, dog" in done.stdout
    assert "2 training images" in done.stdout
    assert "loss_mask" in done.stdout
    results = json.loads((output / "inference/results.json").read_text())
    assert {"bbox", "segm"} <= set(results["own_val"])
    run(tmp_path, "train_net.py", "--config-file", output / "config.yaml", "--eval-only", "--resume")
    assert json.loads((output / "inference/results.json").read_text()) == results
    small = (*TINY, "PRETEXT.IMAGE_SIZE", 32, "OUTPUT_DIR", tmp_path / "ssl")
    config = ("--config-file", "configs/demo/ssl_streets.yaml")
    assert "2 training images" in run(tmp_path, "pretrain_ssl.py", *config, "--data", root, *small).stdout


def test_a_locale_that_is_not_utf8_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ASCII, files are the same UTF-8, and what the terminal cannot show is printed as its escape."""
    root = write_yolo(tmp_path / "own")
    (root / "data.yaml").write_text("names: [Käfer, 猫]\n", encoding="utf-8")
    config = tmp_path / "config.yaml"
    base = Path("configs/demo/streets.yaml").resolve()
    config.write_text(f"# Größe\n_BASE_: {base}\nOUTPUT_DIR: {tmp_path / 'out'}\n", encoding="utf-8")
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    done = run(tmp_path, "train_net.py", "--config-file", config, "--data", root, *TINY, fresh=True)
    assert "classes K\\xe4fer, \\u732b" in done.stdout
    assert "the report could not be written" not in done.stdout
    for name in ("report.html", "log.txt"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Käfer" in text and "猫" in text, name
    done = run(tmp_path, "relvit-d2", "check-data", root, "--output", tmp_path / "check", fresh=True)
    assert "K\\xe4fer" in done.stdout
    weights = ("--weights", tmp_path / "out", "--input", root / "images")
    run(tmp_path, "relvit-d2", "predict", *weights, "--output", tmp_path / "found", fresh=True)
    output = ("OUTPUT_DIR", tmp_path / "größe")
    sentence = fails(tmp_path, "train_net.py", "--config-file", config, "--data", root, *output, fresh=True)
    assert "is not valid in the encoding of this locale, ascii: set the environment variable PYTHONUTF8=1" in sentence
    config.write_text(f"_BASE_: {base}\nOUTPUT_DIR: {tmp_path / 'größe'}\n", encoding="utf-8")
    sentence = fails(tmp_path, "train_net.py", "--config-file", config, "--data", root, *TINY, fresh=True)
    assert "OUTPUT_DIR" in sentence and "PYTHONUTF8=1" in sentence


def test_masks_of_some_objects_and_sets_with_nothing_to_find(tmp_path: Path) -> None:
    """Box AP for all objects, mask AP where all have masks, decided before training; evaluation of nothing."""
    root = write_yolo(tmp_path / "own")
    triangle = "0 0.1 0.1 0.9 0.1 0.1 0.9\n"
    (root / "labels/train/a.txt").write_text(triangle)
    (root / "labels/val/c.txt").write_text(triangle + "1 0.5 0.5 0.5 0.5\n")
    flags = ("--config-file", "configs/demo/streets.yaml")
    masks = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    output = tmp_path / "out"
    done = run(tmp_path, "train_net.py", *flags, "--data", root, *TINY, *masks, "OUTPUT_DIR", output)
    sentence = "only box AP is computed on own_val: there is 1 object without a mask"
    assert done.stdout.count(sentence) == 1 and "loss_mask" in done.stdout.partition(sentence)[2]
    results = json.loads((output / "inference/results.json").read_text())["own_val"]
    assert results.keys() == {"bbox"} and results["bbox"]["AP"] is not None
    assert "result   bbox (at most 20 detections an image) AP" in done.stdout
    (root / "labels/val/c.txt").write_text("")
    again = ("train_net.py", "--config-file", output / "config.yaml", "--eval-only", "--resume")
    assert "own_val: not one object" not in run(tmp_path, *again).stdout
    assert json.loads((output / "inference/results.json").read_text())["own_val"]["bbox"]["AP"] is None
    shutil.rmtree(root / "images/val")
    (root / "data.yaml").write_text("names: [Person, Cat]\n")
    (root / "images/train/b.png").unlink()  # one image alone: nothing is held out
    done = run(tmp_path, "train_net.py", *flags, "--data", root, *TINY, "OUTPUT_DIR", tmp_path / "one")
    assert "own_val: no image, so that an evaluation on it finds nothing" in done.stdout
    assert "AP: no objects on own_val" in done.stdout
