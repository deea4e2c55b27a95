"""Small folders of labelled images from the samples: YOLO labels, and a folder of images for each class."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relvit_d2.data.detection.custom import open_folder


def _bccd(samples: Path) -> tuple[tuple[str, ...], dict[str, list[dict[str, Any]]]]:
    _, folder = open_folder(samples / "bccd/BCCD")
    classes = folder.classes()
    return classes, {split: folder.records(split, classes, False) for split in ("train", "val", "test")}


def write_yolo(samples: Path, folder: Path) -> None:
    """Write the blood cells as a YOLO folder with the splits train, val and test."""
    classes, sets = _bccd(samples)
    for split, records in sets.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for record in records:
            source, width, height = Path(record["file_name"]), record["width"], record["height"]
            shutil.copy(source, folder / "images" / split)
            rows = []
            for annotation in record["annotations"]:
                x0, y0, x1, y1 = annotation["bbox"]
                numbers = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
                rows.append(" ".join([str(annotation["category_id"]), *(f"{number:.6f}" for number in numbers)]))
            (folder / "labels" / split / f"{source.stem}.txt").write_text("\n".join(rows))
    names = ", ".join(classes)
    paths = "".join(f"{split}: images/{split}\n" for split in sets)
    (folder / "data.yaml").write_text(f"{paths}nc: {len(classes)}\nnames: [{names}]\n")


def write_crops(samples: Path, folder: Path, size: int = 32, splits: bool = True) -> None:
    """Write the first 8 cells of each class and split, resized to ``size``, as a folder of images for each class."""
    classes, sets = _bccd(samples)
    for split, records in sets.items():
        counts = dict.fromkeys(range(len(classes)), 0)
        for record in records:
            for annotation in record["annotations"]:
                label = annotation["category_id"]
                target = folder / (split if splits else "") / classes[label]
                target.mkdir(parents=True, exist_ok=True)
                if counts[label] < 8:
                    counts[label] += 1
                    crop = Image.open(record["file_name"]).convert("RGB").crop(tuple(annotation["bbox"]))
                    crop.resize((size, size)).save(target / f"{split}_{counts[label]}.png")


def draw_trees(root: Path, mixed: bool = False) -> None:
    """Write two classes, red and blue pictures of 16 px: ``train`` with 12 each, ``test`` with 6 each.

    With ``mixed`` the first one is wider. Images of several sizes are read by loader processes; others are read once.
    """
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("red", "blue")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                width = 20 if mixed and number == 0 else 16
                pixels = random.integers(0, 60, (16, width, 3), dtype=np.uint8)
                pixels[..., 2 * label] += 180
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")


def damage_trees(trees: Path, root: Path) -> list[Path]:
    """Copy the images of :func:`draw_trees`, two unreadable ones in each part; return these, the headless ones first.

    The last blue training image, whose header is intact, is followed by a red one.
    """
    shutil.copytree(trees, root)
    headless, cut = ("train/red/0.png", "test/red/3.png"), ("train/blue/9.png", "test/blue/2.png")
    for name in headless:
        (root / name).write_bytes(b"")
    for name in cut:
        (root / name).write_bytes((root / name).read_bytes()[:400])
    return [root / name for name in (*headless, *cut)]
