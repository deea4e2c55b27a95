"""Detections as labels to correct, which annotation programs open and custom data sets read; needs no torch.

The labels are a folder with the layout of the images, so that its content can be copied into their folder: a file
beside each image (YOLO, VOC, LabelMe), or one file at the top (COCO, CVAT). Images without a detection are included.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import numpy as np
import yaml  # type: ignore[import-untyped]

from relvit_d2.detection.detections import Detections
from relvit_d2.report.outlines import outlines, signed_area
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing
from relvit_d2.utils.paths import check_printable


class LabelledObject(NamedTuple):
    """An object in an image, in pixels."""

    category: int  # index of the class
    box: tuple[float, float, float, float]  # XYXY
    polygons: list[np.ndarray]  # (N, 2), x and y, of each part of the mask, the largest first; [] without masks


class LabelledImage(NamedTuple):
    """An image and its objects; width and height in pixels."""

    name: PurePosixPath  # relative to the folder of the images
    width: int
    height: int
    objects: list[LabelledObject]


class LabelFiles:
    """Collects the detections in images and writes them as labels.

    Attributes:
        folder: the folder of the labels, which :meth:`write` creates.
        root: the folder that contains all images.

    Args:
        form: a key of :data:`WRITERS`.
        output: ``folder`` is ``labels_FORMAT`` in it.
        files: one or more images.

    Raises:
        UserError: ``folder`` exists, or the labels of two images would be the same file.
    """

    def __init__(self, form: str, output: Path, files: Sequence[Path]) -> None:
        self.folder, self._form = output / f"labels_{form}", form
        if self.folder.exists():
            raise UserError(
                f"'{self.folder}' exists and may contain corrected labels: rename it, or give another --output"
            )
        check_printable(files)
        paths = {file: Path(os.path.abspath(file)) for file in files}  # noqa: PTH100  (does not follow links)
        self.root = Path(os.path.commonpath([path.parent for path in paths.values()]))
        self._names = {file: PurePosixPath(path.relative_to(self.root).as_posix()) for file, path in paths.items()}
        self._images: list[LabelledImage] = []
        _check_unique(self._names, form)

    def add(self, file: Path, size: tuple[int, int], found: Detections) -> None:
        """Add the detections in an image of this width and height in pixels."""
        objects = []
        for number, (category, box) in enumerate(zip(found.classes.tolist(), found.boxes.tolist(), strict=True)):
            x0, y0, x1, y1 = box
            polygons: list[np.ndarray] = []
            if found.masks is not None:  # an empty mask is replaced by the box
                rectangle = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
                mask = found.masks[number]
                polygons = [outline + (mask.left, mask.top) for outline in outlines(mask.pixels)] or [rectangle]
            objects.append(LabelledObject(category, (x0, y0, x1, y1), polygons))
        self._images.append(LabelledImage(self._names[file], *size, objects))

    def write(self, classes: Sequence[str]) -> None:
        """Write the folder, whole or not at all; nothing if no image was added.

        Args:
            classes: names of the class indices.

        Raises:
            NotWrittenError: the disk is full or the folder cannot be written.
        """
        if not self._images:
            return
        with appearing(self.folder) as part:
            try:
                part.mkdir()
                WRITERS[self._form](part, self._images, classes)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise


def _check_unique(names: dict[Path, PurePosixPath], form: str) -> None:
    files: dict[PurePosixPath, Path] = {}
    for file, name in names.items():
        if form == "yolo" and name.with_suffix(".txt") == PurePosixPath(CLASS_LIST):
            raise UserError(f"the labels of '{file}' would be the list of classes, '{CLASS_LIST}': rename the image")
        labels = name.with_suffix("") if form in PER_IMAGE else name
        if (other := files.setdefault(labels, file)) != file:
            raise UserError(
                f"the labels of '{other}' and '{file}' would be the same: rename one image, or leave it out"
            )


def _coco(folder: Path, images: Sequence[LabelledImage], classes: Sequence[str]) -> None:
    """Write ``annotations.json``; ids are counted from 1."""
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        for category, (x0, y0, x1, y1), polygons in image.objects:
            area = sum(map(signed_area, polygons)) if polygons else (x1 - x0) * (y1 - y0)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category + 1, "iscrowd": 0}
                | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area}
                | {"segmentation": [polygon.ravel().tolist() for polygon in polygons]}
            )
    entries = [
        {"id": number, "file_name": str(image.name), "width": image.width, "height": image.height}
        for number, image in enumerate(images, start=1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    _write_json(folder / "annotations.json", {"images": entries, "annotations": annotations, "categories": categories})


def _yolo(folder: Path, images: Sequence[LabelledImage], classes: Sequence[str]) -> None:
    """Write a text file for each image, with polygons for masks, and the classes as Ultralytics and LabelImg do."""
    names = yaml.safe_dump({"names": dict(enumerate(classes))}, allow_unicode=True, sort_keys=False)
    _write(folder / "data.yaml", names)
    _write(folder / CLASS_LIST, "".join(f"{name}\n" for name in classes))
    for image in images:
        lines = []
        for category, (x0, y0, x1, y1), polygons in image.objects:
            values = polygons[0] if polygons else np.array([((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0, y1 - y0)])
            fractions = (values / (image.width, image.height)).ravel().tolist()
            lines.append(" ".join([str(category), *(f"{fraction:.6f}" for fraction in fractions)]) + "\n")
        _write(folder / image.name.with_suffix(".txt"), "".join(lines))


def _voc(folder: Path, images: Sequence[LabelledImage], classes: Sequence[str]) -> None:
    """Write an XML file for each image, with boxes in whole pixels."""
    for image in images:
        root = Element("annotation")
        SubElement(root, "filename").text = image.name.name
        size = SubElement(root, "size")
        for tag, value in (("width", image.width), ("height", image.height), ("depth", 3)):
            SubElement(size, tag).text = str(value)
        for category, (x0, y0, x1, y1), _ in image.objects:
            entry = SubElement(root, "object")
            SubElement(entry, "name").text = classes[category]
            for tag, text in (("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0")):
                SubElement(entry, tag).text = text
            box = SubElement(entry, "bndbox")
            (xmin, xmax), (ymin, ymax) = _whole_pixels(x0, x1, image.width), _whole_pixels(y0, y1, image.height)
            for tag, value in (("xmin", xmin), ("ymin", ymin), ("xmax", xmax), ("ymax", ymax)):
                SubElement(box, tag).text = str(value)
        _write_xml(folder / image.name.with_suffix(".xml"), root)


def _whole_pixels(start: float, end: float, size: int) -> tuple[int, int]:
    """Return the first and the last pixel, counted from 1, of a side of a box; two pixels at least if the image has."""
    first = round(start) + 1
    last = min(max(round(end), first + 1), size)
    return max(min(first, last - 1), 1), last


def _labelme(folder: Path, images: Sequence[LabelledImage], classes: Sequence[str]) -> None:
    """Write a JSON file for each image; the parts of an object are shapes of one group."""
    for image in images:
        shapes: list[dict[str, Any]] = []
        for number, (category, (x0, y0, x1, y1), polygons) in enumerate(image.objects):
            kind = "polygon" if polygons else "rectangle"
            group = number if len(polygons) > 1 else None
            shapes += [
                {"label": classes[category], "points": points, "group_id": group, "shape_type": kind, "flags": {}}
                for points in [polygon.tolist() for polygon in polygons] or [[[x0, y0], [x1, y1]]]
            ]
        document: dict[str, Any] = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imageData": None}
        document |= {"imagePath": image.name.name, "imageHeight": image.height, "imageWidth": image.width}
        _write_json(folder / image.name.with_suffix(".json"), document)


def _cvat(folder: Path, images: Sequence[LabelledImage], classes: Sequence[str]) -> None:
    """Write ``annotations.xml`` in the format "CVAT for images"."""
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    labels = SubElement(SubElement(SubElement(root, "meta"), "task"), "labels")
    for name in classes:
        SubElement(SubElement(labels, "label"), "name").text = name
    for number, image in enumerate(images):
        size = {"width": str(image.width), "height": str(image.height)}
        entry = SubElement(root, "image", {"id": str(number), "name": str(image.name)} | size)
        for category, box, polygons in image.objects:
            common = {"label": classes[category], "source": "auto", "occluded": "0", "z_order": "0"}
            if polygons:
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in polygons[0].tolist())
                SubElement(entry, "polygon", common | {"points": points})
            else:
                corners = {tag: f"{v:.2f}" for tag, v in zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True)}
                SubElement(entry, "box", common | corners)
    _write_xml(folder / "annotations.xml", root)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    _write(path, json.dumps(document, ensure_ascii=False))


def _write_xml(path: Path, root: Element) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    indent(root)
    ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


CLASS_LIST = "classes.txt"  # YOLO's, in which LabelImg looks for the names
WRITERS: dict[str, Callable[[Path, Sequence[LabelledImage], Sequence[str]], None]] = {
    "coco": _coco,
    "yolo": _yolo,
    "voc": _voc,
    "labelme": _labelme,
    "cvat": _cvat,
}
"""Writers of label files: of a folder that exists, images, and the names of the class indices."""
PER_IMAGE = ("yolo", "voc", "labelme")  # formats with a file for each image
