"""Small custom data sets in every format and folder layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from PIL import Image

from relvit_d2.data.detection.custom import open_folder
from relvit_d2.data.detection.records import Record
from relvit_d2.tasks import load_config

XML = """<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>"""


OBJECT = """<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>
<ymax>{box[3]}</ymax></bndbox></object>"""


# The content of every data set: name, split, and objects as class and box on an image of 40 x 30 pixels.
IMAGES: tuple[tuple[str, str, list[tuple[str, list[int]]]], ...] = (
    ("a", "train", [("cat", [4, 6, 20, 24]), ("dog", [0, 0, 40, 30])]),
    ("b", "train", []),
    ("c", "val", [("dog", [10, 3, 30, 15])]),
)


def picture(path: Path, seed: int = 0) -> None:
    """Save an image of smooth noise, 40 x 30 pixels."""
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
                    annotation = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": {"dog": 7, "cat": 1}[kind]}
                    annotation |= {"id": len(document["annotations"]), "image_id": ord(name)}
                    document["annotations"].append(annotation)
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/{split}.json").write_text(json.dumps(document))
    return root


def write_split_first_coco(root: Path) -> Path:
    """A folder for each split, with the annotation file among the images."""
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
    """VOC's layout in a sub-folder, as archives unpack."""
    write_voc(root / "VOC2007")
    return root


def write_flat_voc(root: Path) -> Path:
    """XML beside the images, in a folder for each split, without image sizes."""
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
        if objects:  # an image without objects has no label file
            (root / f"labels/{split}/{name}.txt").write_text(yolo_lines(objects, {"cat": 0, "dog": 1}))
    (root / "data.yaml").write_text(
        "path: /no/such\ntrain: ../images/train\nval: /no/such/images/val\nnames: [cat, dog]\n"
    )
    return root


def write_split_first_yolo(root: Path) -> Path:
    """A folder for each split with images and labels, class numbers with gaps, names by number."""
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


def custom_keys(**sets: dict[str, Any]) -> CfgNode:
    """Return the node ``DATASETS`` of a config that trains on custom data sets."""
    names = tuple(sets)
    return load_config("configs/demo/streets.yaml", ["DATASETS.CUSTOM", sets, "DATASETS.TRAIN", names]).DATASETS  # type: ignore[list-item]


def yolo_folder(root: Path, *names: str, label: str = "0 0.5 0.5 0.4 0.4\n") -> Path:
    """Labelled images in YOLO format, by their paths below ``images``."""
    for number, name in enumerate(names):
        picture(root / f"images/{name}.png", number)
        path = root / f"labels/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(label)
    return root


def stems(folder: Any) -> dict[str, list[str]]:
    return {split: sorted(path.stem for path in folder.images(split, False)) for split in sorted(folder.sets)}


def read_all(root: Path, form: str) -> list[Record]:
    """Read all splits of a folder."""
    folder = open_folder(root, form)[1]
    return [record for split in folder.sets for record in folder.records(split, folder.classes(), False)]
