"""Small valid data sets for every reader, and the checks of a reader's result on damaged ones.

Add a line to ``READERS`` for every new reader: its name, the function that writes a small valid data set into a data
root, and the function that reads it. ``mutations`` damages it by file extension.
"""

import json
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image

from relvit_d2.data.classification.datasets import get_class_set
from relvit_d2.data.detection.catalog import DATASETS, get_images, get_records
from relvit_d2.data.images.archive import Member
from relvit_d2.data.images.decode import image_size, read_rgb
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import (
    read_all,
    write_csv,
    write_cvat,
    write_image_folder,
    write_image_folder_csv,
    write_label_studio,
    write_labelme,
    write_parquet,
)
from tests.support.damaged_files import write_mat


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    """Save an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def make_voc(root: Path) -> None:
    """Write VOC's train split with three images."""
    folder = root / "VOC2007"
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("000001\n000002\n000003\n")
    for number in range(1, 4):
        noise(folder / f"JPEGImages/00000{number}.jpg", number)
        objects = "".join(
            f"<object><name>{name}</name><pose>Left</pose><truncated>1</truncated><difficult>{number % 2}</difficult>"
            f"<bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>{x + 9}</xmax><ymax>30</ymax></bndbox></object>"
            for name, x in (("dog", 1), ("person", 12), ("car", 31))
        )
        size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
        text = f"<annotation><filename>00000{number}.jpg</filename>{size}{objects}</annotation>"
        (folder / f"Annotations/00000{number}.xml").write_text(text)


def make_xml(root: Path) -> None:
    """Write images and annotations in VOC's format without lists."""
    make_voc(root)
    shutil.rmtree(root / "VOC2007/ImageSets")


def make_coco(root: Path) -> None:
    """Write COCO's val2017 with three images, all 80 categories, polygons, a crowd and an uncompressed RLE."""
    classes = DATASETS["coco_2017_val"].classes
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    ids = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]
    images, annotations = [], []
    for number in range(1, 4):
        name = f"00000000000{number}.jpg"
        noise(root / "coco/val2017" / name, number)
        images.append({"id": number, "file_name": name, "width": 40, "height": 30})
        polygon = [[2, 2, 12, 2, 12, 12, 2, 12]]
        runs = {"size": [30, 40], "counts": [100, 50, 1050]}
        for key, shape, crowd in ((1, polygon, 0), (2, runs, 1), (3, [[20, 5, 30, 5, 30, 25]], 0)):
            box = [2, 2, 10, 10] if key == 1 else [20, 5, 10, 20]
            annotations.append(
                {"id": 10 * number + key, "image_id": number, "category_id": ids[key * number], "bbox": box}
                | {"area": 100, "iscrowd": crowd, "segmentation": shape}
            )
    categories = [{"id": key, "name": name} for key, name in zip(ids, classes, strict=True)]
    (root / "coco/annotations").mkdir()
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "coco/annotations/instances_val2017.json").write_text(json.dumps(document))


def make_svhn(root: Path) -> None:
    """Write SVHN's test split with three images, of one, two and three digits."""
    folder = root / "svhn/test"
    for number in range(1, 4):
        noise(folder / f"{number}.png", number)
    digits = [(2.0, 3.0, 6.0, 12.0, 10.0), (10.0, 3.0, 6.0, 12.0, 1.0), (-1.0, 20.0, 50.0, 20.0, 9.0)]
    write_mat(folder / "digitStruct.mat", [(f"{number}.png", digits[:number]) for number in range(1, 4)])


def make_kitti(root: Path) -> None:
    """Write KITTI's training folder with four images."""
    folder = root / "kitti/training"
    (folder / "label_2").mkdir(parents=True)
    rest = "1.65 1.67 3.64 -0.65 1.71 46.70 -1.59"
    for number in range(4):
        noise(folder / f"image_2/00000{number}.png", number, (60, 30))
        rows = [
            f"Car 0.00 0 1.85 3.5 2.25 22.75 20.0 {rest}",
            f"Pedestrian 0.50 2 0.2 30.0 0.0 39.5 29.0 {rest}",
            "DontCare -1 -1 -10 40.0 4.0 59.0 12.0 -1 -1 -1 -1000 -1000 -1000 -10",
        ]
        (folder / f"label_2/00000{number}.txt").write_text("\n".join(rows) + "\n")


def make_images(root: Path) -> None:
    """Write images of many formats and modes, one of them in a sub-folder."""
    folder = root / "images"
    kinds = [("a.png", "RGB"), ("b.jpg", "RGB"), ("c.png", "P"), ("d.png", "L"), ("e.png", "RGBA"), ("f.png", "1")]
    kinds += [("g.bmp", "RGB"), ("h.tif", "RGB"), ("i.webp", "RGB"), ("j.jpg", "CMYK"), ("sub/k.ppm", "RGB")]
    kinds += [("m.gif", "P"), ("n.jfif", "RGB")]
    for seed, (name, mode) in enumerate(kinds):
        noise(folder / name, seed, (9, 7), mode)
    Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000).save(folder / "l.png")


def make_yolo(root: Path) -> None:
    """Write images, boxes, a polygon and class names in Ultralytics' layout."""
    for number in range(1, 4):
        noise(root / f"images/train/{number}.jpg", number)
    (root / "labels/train").mkdir(parents=True)
    (root / "labels/train/1.txt").write_text("0 0.5 0.5 0.5 0.5\n2 0.1 0.2 0.2 0.4\n")
    (root / "labels/train/2.txt").write_text("1 0.1 0.1 0.9 0.1 0.5 0.8\n")
    (root / "data.yaml").write_text("train: images/train\nnc: 3\nnames:\n  0: cat\n  1: dog\n  2: cow\n")


def make_archives(root: Path) -> None:
    """Write a tar and a zip with the images of :func:`make_images`; the zip uses three compression methods."""
    make_images(root)
    files = sorted(path for path in (root / "images").rglob("*") if path.is_file())
    with tarfile.open(root / "photos.tar", "w") as tar, zipfile.ZipFile(root / "photos.zip", "w") as packed:
        for index, path in enumerate(files):
            name = path.relative_to(root).as_posix()
            tar.add(path, name)
            packed.write(path, name, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)[index % 3])
    shutil.rmtree(root / "images")


def make_classes(root: Path) -> None:
    """Write a zip and a tar with a folder of images for each of two classes."""
    for name in ("cat", "dog"):
        for number in range(2):
            noise(root / f"{name}/{number}.png", number)
    with tarfile.open(root / "classes.tar", "w") as tar, zipfile.ZipFile(root / "classes.zip", "w") as packed:
        for path in sorted(root.glob("*/*.png")):
            tar.add(path, path.relative_to(root).as_posix())
            packed.write(path, path.relative_to(root).as_posix())
    for name in ("cat", "dog"):
        shutil.rmtree(root / name)


def read_classes(archive: Path) -> list[dict[str, Any]]:
    """Read a classification data set as records without objects."""
    found = get_class_set(str(archive))
    assert len(found.classes) > 1 and len(found.labels) == len(found)
    return [
        {"file_name": str(archive), "image_id": number, "height": image.shape[1], "width": image.shape[2]}
        for number, image in enumerate(found.images)
        if not isinstance(image, Member)
    ]


def read_images(*sources: Path) -> list[dict[str, Any]]:
    """List images and decode those that are readable, as pre-training does."""
    records = []
    for path in [image for source in sources for image in get_images(str(source))]:
        with suppress(UserError):
            pixels = read_rgb(path)
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            assert image_size(path) == pixels.shape[1::-1], path
            records.append(
                {"file_name": str(path), "image_id": str(path), "height": pixels.shape[0], "width": pixels.shape[1]}
            )
    return records


MANY = 120  # upper limit of classes in a damaged data set of at most 80


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        make: writes a small valid data set into a data root.
        read: reads it; ``DETECTRON2_DATASETS`` is the data root.
        classes: number of classes.
        links: whether it follows links, since all paths are given by the user.
        cached: whether images are written to the user's cache.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], list[dict[str, Any]]]
    classes: int = 0
    links: bool = False
    cached: bool = False


def of_catalog(make: Callable[[Path], None], name: str) -> Reader:
    """Return the reader of a data set of the catalog."""
    return Reader(make, lambda _: get_records(name), len(DATASETS[name].classes))


def of_custom(make: Callable[[Path], Any], form: str) -> Reader:
    """Return the reader of a custom data set, whose classes are those in its files."""
    return Reader(make, lambda root: read_all(root, form), MANY)


READERS = {
    "voc": of_catalog(make_voc, "voc_2007_train"),
    "svhn": of_catalog(make_svhn, "svhn_test"),
    "coco": of_catalog(make_coco, "coco_2017_val"),
    "kitti": of_catalog(make_kitti, "kitti_train"),
    "custom_coco": of_custom(make_coco, "coco"),
    "custom_voc": of_custom(make_voc, "voc"),
    "custom_xml": of_custom(make_xml, "voc"),
    "custom_yolo": of_custom(make_yolo, "yolo"),
    "custom_labelme": of_custom(write_labelme, "labelme"),
    "custom_cvat": of_custom(write_cvat, "cvat"),
    "custom_labelstudio": of_custom(write_label_studio, "labelstudio"),
    "custom_csv": of_custom(write_csv, "csv"),
    "custom_huggingface": of_custom(write_image_folder, "huggingface"),
    "custom_huggingface_csv": of_custom(write_image_folder_csv, "huggingface"),
    "custom_parquet": replace(of_custom(write_parquet, "huggingface"), cached=True),
    "images": Reader(make_images, lambda root: read_images(root / "images"), links=True),
    "zip": Reader(make_archives, lambda root: read_images(root / "photos.zip")),
    "tar": Reader(make_archives, lambda root: read_images(root / "photos.tar")),
    "zip_of_classes": Reader(make_classes, lambda root: read_classes(root / "classes.zip")),
    "tar_of_classes": Reader(make_classes, lambda root: read_classes(root / "classes.tar")),
}


def check_records(records: list[dict[str, Any]], roots: Sequence[Path], classes: int) -> None:
    """Assert that records are valid, and their images below one of ``roots``."""
    real = tuple(os.path.realpath(root) + os.sep for root in roots)
    ids = [record["image_id"] for record in records]
    assert len(set(ids)) == len(ids)
    for record in records:
        assert os.path.realpath(record["file_name"]).startswith(real), record["file_name"]
        width, height = record["width"], record["height"]
        assert type(width) is int and type(height) is int and width >= 0 and height >= 0
        if not width or not height:  # an unreadable image, which the catalog leaves out
            assert width == height == 0 and not record["annotations"]
            continue
        for annotation in record.get("annotations", []):
            assert type(annotation["category_id"]) is int and 0 <= annotation["category_id"] < classes
            assert annotation["iscrowd"] in (0, 1)
            x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, annotation["bbox"]


_watched: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _watched.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_watch)


@contextmanager
def nothing_else_is_opened(*allowed: Path) -> Iterator[None]:
    """Fail if a file outside ``allowed`` and Python's own folders is opened.

    Python's audit hook reports only files that Python opens, not those of the HDF5 library.
    """
    global _watched
    _watched = []
    try:
        yield
        python = [Path(path) for path in (sys.prefix, sys.base_prefix, "/proc", "/dev/null")]
        roots = {os.path.realpath(path) for path in (*python, Path(__file__).parents[2], *allowed)}
        outside = [
            path for path in _watched if not any(path == root or path.startswith(root + os.sep) for root in roots)
        ]
        assert not outside, f"read outside the data root: {outside}"
    finally:
        _watched = None


def outcome(reader: Reader, root: Path, *allowed: Path) -> list[dict[str, Any]] | UserError:
    """Return valid records or a one-sentence error of a damaged set; assert that no other file is read."""
    with nothing_else_is_opened(root.parent if reader.links else root, *allowed):
        try:
            records = reader.read(root)
        except UserError as error:
            assert str(error).isprintable() and str(error), repr(str(error))
            return error
    roots = [root.parent] if reader.links else [root, *allowed] if reader.cached else [root]
    check_records(records, roots, reader.classes)
    return records
