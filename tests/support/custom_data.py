"""Small custom data sets in every format and folder layout."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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


def write_labelme(root: Path) -> Path:
    """A JSON file beside each image, rectangles drawn from any corner."""
    for name, split, objects in IMAGES:
        picture(root / f"{split}/{name}.png")
        shapes: list[dict[str, Any]] = [
            {"label": kind, "shape_type": "rectangle", "points": [[x1, y0], [x0, y1]], "group_id": None, "flags": {}}
            for kind, (x0, y0, x1, y1) in objects
        ]
        document = {"version": "5.5.0", "imagePath": f"..\\{split}\\{name}.png", "imageData": None, "shapes": shapes}
        text = json.dumps(document | {"imageWidth": 40, "imageHeight": 30})
        (root / f"{split}/{name}.json").write_text(text)
    return root


def cvat_xml(images: Sequence[tuple[str, str, list[tuple[str, list[int]]]]]) -> str:
    entries = []
    for number, (name, split, objects) in enumerate(images):
        boxes = "".join(
            f'<box label="{kind}" source="manual" occluded="0" xtl="{x0}.00" ytl="{y0}.00" xbr="{x1}.00" '
            f'ybr="{y1}.00" z_order="0"><attribute name="colour">red</attribute></box>'
            for kind, (x0, y0, x1, y1) in objects
        )
        start = f'<image id="{number}" name="{name}.png" subset="{split.title()}" task_id="1" width="40" height="30">'
        entries.append(f"{start}{boxes}</image>")
    labels = "".join(f"<label><name>{name}</name><type>any</type></label>" for name in ("dog", "cat"))
    meta = f"<version>1.1</version><meta><project><labels>{labels}</labels></project></meta>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>{meta}{"".join(entries)}</annotations>'


def write_cvat(root: Path) -> Path:
    """One file for all images, as CVAT exports a project."""
    for name, _, _ in IMAGES:
        picture(root / f"images/{name}.png")
    (root / "annotations.xml").write_text(cvat_xml(IMAGES))
    return root


def write_label_studio(root: Path) -> Path:
    """A file for each split; images were uploaded."""
    for split in ("train", "val"):
        tasks = []
        for name, part, objects in IMAGES:
            if part == split:
                picture(root / f"photos/{name}.png")
                results = [
                    {"original_width": 40, "original_height": 30, "type": "rectanglelabels", "id": "x"}
                    | {"from_name": "label", "to_name": "image", "image_rotation": 0}
                    | {"value": {"x": x0 / 0.4, "y": y0 / 0.3, "width": (x1 - x0) / 0.4, "height": (y1 - y0) / 0.3}}
                    for _, (x0, y0, x1, y1) in objects
                ]
                for result, (kind, _) in zip(results, objects, strict=True):
                    result["value"] |= {"rotation": 0, "rectanglelabels": [kind]}  # type: ignore[operator]
                link = {"image": f"/data/upload/3/0123abcd-{name}.png"}
                annotations = [{"id": 1, "was_cancelled": False, "ground_truth": False, "result": results}]
                tasks.append({"id": ord(name), "data": link, "annotations": annotations, "predictions": []})
        (root / f"{split}.json").write_text(json.dumps(tasks))
    return root


def write_csv(root: Path) -> Path:
    """A table in the folder of each split, with a row without a box for an image without objects."""
    for name, split, objects in IMAGES:
        picture(root / f"{split}/{name}.png")
        table = root / f"{split}/_annotations.csv"
        if not table.exists():
            table.write_text("filename,width,height,class,xmin,ymin,xmax,ymax\n")
        with table.open("a") as file:
            for row in [(kind, *box) for kind, box in objects] or [("", "", "", "", "")]:
                file.write(",".join(map(str, (f"{name}.png", 40, 30, *row))) + "\n")
    return root


def objects_of(objects: list[tuple[str, list[int]]]) -> dict[str, list[Any]]:
    """Return boxes and classes as data sets of the Hugging Face Hub have them."""
    boxes = [[x0, y0, x1 - x0, y1 - y0] for _, (x0, y0, x1, y1) in objects]
    return {"bbox": boxes, "categories": [kind for kind, _ in objects]}


def write_image_folder(root: Path) -> Path:
    for name, split, objects in IMAGES:
        picture(root / f"{split}/{name}.png")
        with (root / f"{split}/metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{name}.png", "objects": objects_of(objects)}) + "\n")
    return root


def write_image_folder_csv(root: Path) -> Path:
    for name, split, objects in IMAGES:
        picture(root / f"{split}/{name}.png")
        table = root / f"{split}/metadata.csv"
        new = not table.exists()
        with table.open("a", newline="") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(["file_name", "objects"])
            rows.writerow([f"{name}.png", json.dumps(objects_of(objects))])
    return root


def write_parquet(root: Path) -> Path:
    """A file for each split with the images in it and numbers for classes; skips the test without pyarrow."""
    reason = "the extra relvit_d2[formats] is not installed"
    pyarrow = pytest.importorskip("pyarrow", reason=reason)
    parquet = pytest.importorskip("pyarrow.parquet", reason=reason)
    label = {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"}
    features = {"image": {"_type": "Image"}, "objects": {"bbox": {}, "category": label}}
    for split in ("train", "val"):
        images, objects = [], []
        for name, part, labels in IMAGES:
            if part == split:
                picture(root / f"{name}.png")
                images.append({"bytes": (root / f"{name}.png").read_bytes(), "path": f"{name}.png"})
                (root / f"{name}.png").unlink()
                found = objects_of(labels)
                numbers = [("cat", "dog").index(kind) for kind in found["categories"]]
                objects.append({"bbox": found["bbox"], "category": numbers})
        box = pyarrow.list_(pyarrow.list_(pyarrow.float32()))
        kinds = pyarrow.struct([("bbox", box), ("category", pyarrow.list_(pyarrow.int64()))])
        table = pyarrow.table({"image": images, "objects": pyarrow.array(objects, kinds)})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (root / "data").mkdir(exist_ok=True)
        stem = {"train": "train", "val": "validation"}[split]
        parquet.write_table(table, root / f"data/{stem}-00000-of-00001.parquet")
    return root


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "coco": ("coco", write_coco),
    "coco by split": ("coco", write_split_first_coco),
    "voc": ("voc", write_voc),
    "voc one folder deeper": ("voc", write_deeper_voc),
    "voc beside the images": ("voc", write_flat_voc),
    "yolo": ("yolo", write_yolo),
    "yolo by split": ("yolo", write_split_first_yolo),
    "labelme": ("labelme", write_labelme),
    "cvat": ("cvat", write_cvat),
    "label studio": ("labelstudio", write_label_studio),
    "csv": ("csv", write_csv),
    "image folder": ("huggingface", write_image_folder),
    "image folder with a table": ("huggingface", write_image_folder_csv),
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
