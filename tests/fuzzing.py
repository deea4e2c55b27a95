"""Mutated data sets for every reader: what is sound, what spoils it, and what a reader may answer.

``READERS`` is the table. A reader that joins the project is one more line: what it is called, how a small sound set is
written into a data root, and how it is read. What spoils a file is chosen by its ending.
"""

import filecmp
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from detectron2.structures import BoxMode
from PIL import Image
from test_bad_input import huge_png
from test_svhn import write_mat

from relvit_d2.data.catalog import DATASETS, get_images, get_records
from relvit_d2.data.decode import read_rgb
from relvit_d2.data.folder import EXTENSIONS
from relvit_d2.errors import UserError

SECRET = "secret"
NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e308",
    "-1e308",
    "1e999",
    "-1",
    "0",
    "0.5",
    "1e-320",
    "9" * 400,
    "0x1F",
    "1_0",
    "٣",
    "",
)
NAMES = ("", ".", "..", "a/b", "a\\b", "C:\\a", "a\0b", "\u202e", "x" * 300, "~", "%2e%2e", " ", "\ud800", "é", "a\nb")
COCO_NAMES = ("person", "bicycle", "car")


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    """Save an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def make_voc(root: Path) -> None:
    """Write VOC's train list with three images."""
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


def make_coco(root: Path) -> None:
    """Write COCO's val2017 with three images, all 80 categories, polygons, a crowd and an uncompressed RLE."""
    classes = DATASETS["coco_2017_val"].classes
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    ids = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]
    images, things = [], []
    for number in range(1, 4):
        name = f"00000000000{number}.jpg"
        noise(root / "coco/val2017" / name, number)
        images.append({"id": number, "file_name": name, "width": 40, "height": 30})
        polygon = [[2, 2, 12, 2, 12, 12, 2, 12]]
        runs = {"size": [30, 40], "counts": [100, 50, 1050]}
        for key, shape, crowd in ((1, polygon, 0), (2, runs, 1), (3, [[20, 5, 30, 5, 30, 25]], 0)):
            box = [2, 2, 10, 10] if key == 1 else [20, 5, 10, 20]
            things.append(
                {"id": 10 * number + key, "image_id": number, "category_id": ids[key * number], "bbox": box}
                | {"area": 100, "iscrowd": crowd, "segmentation": shape}
            )
    categories = [{"id": key, "name": name} for key, name in zip(ids, classes, strict=True)]
    (root / "coco/annotations").mkdir()
    document = {"images": images, "annotations": things, "categories": categories}
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
    for seed, (name, mode) in enumerate(kinds):
        noise(folder / name, seed, (9, 7), mode)
    Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000).save(folder / "l.png")


def read_images(root: Path) -> list[dict[str, Any]]:
    """List a folder and decode all that can be decoded, as pre-training does."""
    records = []
    for path in get_images(str(root / "images")):
        with suppress(UserError):
            pixels = read_rgb(path)
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            records.append(
                {"file_name": str(path), "image_id": str(path), "height": pixels.shape[0], "width": pixels.shape[1]}
            )
    return records


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        make: writes a small sound set into a data root.
        read: reads it; ``DETECTRON2_DATASETS`` is the data root.
        classes: how many it knows.
        links: whether it follows links, since the user alone says what it reads.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], list[dict[str, Any]]]
    classes: int = 0
    links: bool = False


def of_catalog(make: Callable[[Path], None], name: str) -> Reader:
    """A reader behind a name of the catalog."""
    return Reader(make, lambda _: get_records(name), len(DATASETS[name].classes))


READERS = {
    "voc": of_catalog(make_voc, "voc_2007_train"),
    "svhn": of_catalog(make_svhn, "svhn_test"),
    "images": Reader(make_images, read_images, links=True),
}
if find_spec("relvit_d2.data.coco"):
    READERS["coco"] = of_catalog(make_coco, "coco_2017_val")
if "kitti_train" in DATASETS:
    READERS["kitti"] = of_catalog(make_kitti, "kitti_train")


def check_records(records: list[dict[str, Any]], root: Path, classes: int) -> None:
    """What a reader promises of what it returns."""
    real = os.path.realpath(root)
    ids = [record["image_id"] for record in records]
    assert len(set(ids)) == len(ids)
    for record in records:
        assert os.path.realpath(record["file_name"]).startswith(real + os.sep), record["file_name"]
        width, height = record["width"], record["height"]
        assert type(width) is int and type(height) is int and width > 0 and height > 0
        for thing in record.get("annotations", []):
            assert type(thing["category_id"]) is int and 0 <= thing["category_id"] < classes
            assert thing["iscrowd"] in (0, 1)
            x0, y0, x1, y1 = BoxMode.convert(thing["bbox"], thing["bbox_mode"], BoxMode.XYXY_ABS)
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, thing["bbox"]


_watched: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _watched.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_watch)


@contextmanager
def nothing_else_is_opened(*allowed: Path) -> Iterator[None]:
    """Fail if a file is opened that lies in none of ``allowed`` and is not Python's own.

    Python's audit sees what Python opens; HDF5's library opens its files by itself.
    """
    global _watched
    _watched = []
    try:
        yield
        python = [Path(place) for place in (sys.prefix, sys.base_prefix, "/proc", "/dev/null")]
        roots = {os.path.realpath(place) for place in (*python, Path(__file__).parents[1], *allowed)}
        strays = [
            path for path in _watched if not any(path == root or path.startswith(root + os.sep) for root in roots)
        ]
        assert not strays, f"read outside the data root: {strays}"
    finally:
        _watched = None


def nasty_name(draw: random.Random, outside: Path) -> str:
    """A name that no file of a set should have."""
    ups = "../" * draw.randint(1, 8)
    return draw.choice((*NAMES, f"{ups}{outside.name}/{SECRET}", str(outside / SECRET), f"../{SECRET}"))


def nasty_text(draw: random.Random, outside: Path) -> str:
    """A number or a name."""
    return draw.choice(NUMBERS) if draw.random() < 0.5 else nasty_name(draw, outside)


def encoded(text: str) -> bytes:
    """Bytes of a text that may not be one."""
    return text.encode("utf-8", "surrogatepass")


Mutation = Callable[[Path, random.Random, Path], None]


def flip(path: Path, draw: random.Random, outside: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 8) if data else 0):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random, outside: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randint(0, len(data))])


def stir(path: Path, draw: random.Random, outside: Path) -> None:
    data = path.read_bytes()
    first, last = sorted(draw.randint(0, len(data)) for _ in range(2))
    path.write_bytes(
        data[:first] + draw.choice((b"", draw.randbytes(9), data[first:last] * 2, b"\0" * 50)) + data[last:]
    )


def empty(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()


def folder_instead(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def link_out(path: Path, draw: random.Random, outside: Path) -> None:
    """A link to a sound file outside of the root: all is right but its place."""
    target = outside / f"linked{path.suffix}"
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target if draw.random() < 0.5 else os.path.relpath(target, path.parent))


def link_to_itself(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def foreign_name(path: Path, draw: random.Random, outside: Path) -> None:
    """A second file whose name is no UTF-8."""
    shutil.copy(path, os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe" + os.fsencode(path.suffix)))


def neighbour(path: Path, draw: random.Random, outside: Path) -> None:
    """The content of another file of the set."""
    others = sorted(other for other in path.parent.parent.rglob("*") if other.is_file())
    path.write_bytes(draw.choice(others).read_bytes() if others else b"")


def xml_text(path: Path, draw: random.Random, outside: Path) -> None:
    text = path.read_text()
    spot = draw.choice(list(re.finditer(r">([^<>]+)<", text)) or [re.search("", text)])
    assert spot
    path.write_bytes(encoded(text[: spot.start() + 1] + nasty_text(draw, outside) + text[max(spot.end() - 1, 0) :]))


def xml_element(path: Path, draw: random.Random, outside: Path) -> None:
    text = path.read_text()
    spots = list(re.finditer(r"<(\w+)>(?:(?!<\1>).)*?</\1>", text, re.S))
    if spots:
        spot = draw.choice(spots)
        instead = draw.choice(("", spot[0] * 2, f"<{spot[1]}/>", f"<part>{spot[0]}</part>"))
        path.write_text(text[: spot.start()] + instead + text[spot.end() :])


def xml_bomb(path: Path, draw: random.Random, outside: Path) -> None:
    text = path.read_text()
    (outside / SECRET).write_text("dog")
    head = draw.choice(
        (
            '<!DOCTYPE x [<!ENTITY a0 "ha">'
            + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
            + "]>",
            f'<!DOCTYPE x [<!ENTITY a11 SYSTEM "file://{outside / SECRET}">]>',
            f'<!DOCTYPE x SYSTEM "file://{outside / SECRET}">',
            '<!DOCTYPE x [<!ENTITY % p SYSTEM "http://127.0.0.1:9/x"> %p;]>',
            '<?xml version="1.0" encoding="utf-7"?>',
            '<?xml version="1.0" encoding="no-such"?>',
        )
    )
    path.write_text(head + text.replace("dog", "&a11;" if "a11" in head else "dog", 1))


def xml_depth(path: Path, draw: random.Random, outside: Path) -> None:
    depth = draw.choice((100, 100, 100, 20_000))
    path.write_text(path.read_text().replace("<object>", "<a>" * depth + "</a>" * depth + "<object>", 1))


def json_node(path: Path, draw: random.Random, outside: Path) -> None:
    """Change, remove or double something somewhere; the few long lists do not hide the small ones."""
    document = json.loads(path.read_text())
    node, depth = document, draw.randint(1, 5)
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw.choice(keys) if keys else None
        depth -= 1
        if key is None or depth == 0 or not isinstance(node[key], dict | list):
            break
        node = node[key]
    values: tuple[Any, ...] = (None, True, "", [], {}, [[]], float("nan"), float("inf"), 1e308, -1, 0, 10**30, "1")
    values += (nasty_name(draw, outside), [1, 2], [1, 2, 3, "x"], {"size": [1, 2], "counts": "\x7f"}, [0, 0, 0, 0])
    if key is not None:
        action = draw.randrange(4)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, list):
            node.append(node[key])
        else:
            node[key] = draw.choice(values)
    path.write_text(json.dumps(document))


def json_depth(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_text(
        draw.choice(("[" * 100_000, '{"images":' * 50_000, "[]", "3", '{"images": [], "images": 3}', "null"))
    )


def text_field(path: Path, draw: random.Random, outside: Path) -> None:
    lines = [line.split(" ") for line in path.read_text().split("\n")]
    line = draw.choice(lines)
    line[draw.randrange(len(line))] = nasty_text(draw, outside)
    path.write_bytes(encoded("\n".join(map(" ".join, lines))))


def text_line(path: Path, draw: random.Random, outside: Path) -> None:
    lines = path.read_text().split("\n")
    spot = draw.randrange(len(lines))
    lines[spot : spot + 1] = draw.choice(
        ([], lines[spot : spot + 1] * 2, [" ".join(lines[spot].split()[:-1])], ["\ufeff"])
    )
    path.write_text(draw.choice(("\n", "\r\n", "\x85")).join(lines))


def hdf5_node(path: Path, draw: random.Random, outside: Path) -> None:
    """Remove an object, or put one of another type, size, storage or a link in its place."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = draw.choice(names)
        node = file[name]
        if isinstance(node, h5py.Dataset) and draw.random() < 0.7:
            column = node.dtype == h5py.ref_dtype
            objects = [file[other].ref for other in draw.sample(names, min(5, len(names)))] + [h5py.Reference()]
            if draw.random() < 0.6:
                shape = node.shape
                values: Any = (
                    np.array(draw.choices(objects, k=node.size), h5py.ref_dtype).reshape(shape)
                    if column
                    else np.full(shape, draw.choice((np.nan, np.inf, -1e308, 1e308, -1, 0, 300))).astype(node.dtype)
                )
                node[...] = values
                return
            del file[name]
            other: Any = draw.choice(
                (np.ones((1, 1)), np.ones(3), "text", np.ones((2, 2), np.complex64), np.zeros((0, 1)), h5py.Empty("f"))
            )
            file[name] = other
            return
        del file[name]
        file[name] = draw.choice((h5py.SoftLink("/" + name), h5py.SoftLink("/digitStruct"), h5py.SoftLink("/nowhere")))


def hdf5_outside(path: Path, draw: random.Random, outside: Path) -> None:
    """The same labels, but part of them lies in a file outside of the root."""
    target = outside / "labels.h5"
    shutil.copy(path, target)
    with h5py.File(path, "r+") as file:
        name = draw.choice(("digitStruct", "digitStruct/name", "#refs#/b0/left", "#refs#/n0", "#refs#/b1/label"))
        node = file[name]
        if isinstance(node, h5py.Dataset) and node.dtype != h5py.ref_dtype and draw.random() < 0.6:
            values, raw = node[...], outside / "values"
            raw.write_bytes(values.tobytes())
            inner = file["#refs#/b0"] if name == "#refs#/b0/left" else None
            if inner is not None and draw.random() < 0.5:
                layout = h5py.VirtualLayout(values.shape, values.dtype)
                layout[...] = h5py.VirtualSource(str(target), name, values.shape)
                del file[name]
                file.create_virtual_dataset(name, layout)
            else:
                del file[name]
                file.create_dataset(name, values.shape, values.dtype, external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
            if name == "#refs#/n0":
                references = file["digitStruct/name"][...]
                references[0] = file[name].ref
                file["digitStruct/name"][...] = references
        else:
            del file[name]
            file[name] = h5py.ExternalLink(str(target), "/" + name)


def huge_image(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_bytes(huge_png())


ANY: tuple[Mutation, ...] = (cut, empty, remove, folder_instead, link_out, link_to_itself, foreign_name, neighbour)
BY_ENDING: dict[str, tuple[Mutation, ...]] = {
    ".xml": (xml_text, xml_text, xml_text, xml_element, xml_element, xml_bomb, xml_depth, flip, stir),
    ".json": (*[json_node] * 20, json_depth, flip, stir),
    ".txt": (text_field, text_field, text_field, text_line, flip, stir),
    ".mat": (*[hdf5_node] * 5, hdf5_outside),
    **dict.fromkeys(EXTENSIONS, (flip, flip, stir, huge_image)),
}


def spoil(root: Path, outside: Path, seed: int, sound: Path) -> str:
    """Spoil one file of a data root, a copy of ``sound``; return what was done."""
    draw = random.Random(seed)
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return "nothing left"
    # Labels decide more than pixels.
    path = draw.choices(files, [1.0 if file.suffix in EXTENSIONS else 5.0 for file in files])[0]
    mutation = draw.choice(BY_ENDING.get(path.suffix.lower(), (flip, stir)) if draw.random() < 0.75 else ANY)
    first = sound / path.relative_to(root)
    if mutation in (hdf5_node, hdf5_outside) and not (first.is_file() and filecmp.cmp(path, first, shallow=False)):
        mutation = stir  # HDF5's library may crash where it changes a damaged file
    # A file that an earlier change left is not always one that this change can take apart.
    with suppress(UnicodeDecodeError, json.JSONDecodeError, RecursionError, OSError, KeyError, RuntimeError, TypeError):
        mutation(path, draw, outside)
    return f"{mutation.__name__} {path.relative_to(root)}"


def outcome(reader: Reader, root: Path, *allowed: Path) -> list[dict[str, Any]] | UserError:
    """Read a spoilt set: sound records or one sentence, and nothing read that lies elsewhere."""
    with nothing_else_is_opened(root.parent if reader.links else root, *allowed):
        try:
            records = reader.read(root)
        except UserError as error:
            assert str(error) and "\n" not in str(error), repr(str(error))
            return error
    check_records(records, root.parent if reader.links else root, reader.classes)
    return records
