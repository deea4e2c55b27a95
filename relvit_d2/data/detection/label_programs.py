"""Label files of LabelMe, CVAT and Label Studio, and tables of boxes, converted to COCO annotations.

Shapes without an area (points, lines) and brush strokes are left out with a warning. Rectangles and ellipses become
boxes, as do masks that are stored as pixels, polygons become masks.
"""

import csv
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from relvit_d2.data.detection.coco import finite_numbers, has_keys, json_files
from relvit_d2.data.detection.converted import LabelFormat, LabelledImage
from relvit_d2.data.detection.records import files_with, folders_below
from relvit_d2.data.detection.voc import parse_xml
from relvit_d2.utils.errors import UserError

Points = Sequence[Sequence[float]]

COLUMNS = {
    "image": ("filename", "file_name", "image", "image_path", "image_id", "path", "file"),
    "name": ("class", "label", "class_name", "category", "name"),
    **{"xmin": ("xmin", "x_min", "x1"), "ymin": ("ymin", "y_min", "y1")},
    **{"xmax": ("xmax", "x_max", "x2"), "ymax": ("ymax", "y_max", "y2")},
}
"""Names of the columns of a table, in lower case."""

UPLOAD = re.compile(r"^[0-9a-f]{8}-")
"""Label Studio puts it before the names of uploaded files."""

logger = logging.getLogger(__name__)


def shape(name: Any, points: Points, where: str, polygons: Sequence[Points] = ()) -> dict[str, Any]:
    """Return the annotation of an object with the smallest box around ``points``, (x, y) in pixels."""
    xs, ys = zip(*points, strict=True)
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    result: dict[str, Any] = {"category_id": name, "where": where, "bbox": box}
    if polygons:
        result["segmentation"] = [[value for point in polygon for value in point] for polygon in polygons]
    return result


def rotated(points: Points, centre: Sequence[float], degrees: float) -> Points:
    """Return points rotated clockwise in the image."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x0, y0 = centre
    return [
        (x0 + (x - x0) * cosine - (y - y0) * sine, y0 + (x - x0) * sine + (y - y0) * cosine) if degrees else (x, y)
        for x, y in points
    ]


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Points:
    """Return the corners of a box."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float) -> Points:
    """Return two corners of the smallest box around an ellipse; ``rx`` and ``ry`` are the half-axes."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    width, height = math.hypot(rx * cosine, ry * sine), math.hypot(rx * sine, ry * cosine)
    return [(x - width, y - height), (x + width, y + height)]


def _warn_left_out(path: Path, kinds: Counter[str]) -> None:
    if kinds:
        shapes = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        logger.warning(f"shapes of {path} are left out, since they are neither boxes nor polygons: {shapes}")


def _labelme_image(path: Path) -> Iterator[LabelledImage]:
    """Yield the image of a LabelMe file; shapes with one label and ``group_id`` are parts of one object."""
    document = json.loads(path.read_bytes())
    left_out: Counter[str] = Counter()
    parts: dict[Any, list[tuple[Points, bool]]] = {}
    places: dict[Any, tuple[Any, str]] = {}
    for number, entry in enumerate(document["shapes"], start=1):
        where = f"{path}, shape {number}"
        kind = entry.get("shape_type") or "polygon"
        if kind not in ("rectangle", "polygon", "circle", "mask"):
            left_out[str(kind)] += 1
            continue
        points: Points = [finite_numbers(point, where, 2) for point in entry["points"]]
        if len(points) < (3 if kind == "polygon" else 2):
            raise UserError(f"{where} is a {kind} of {len(points)} points: correct or remove it")
        if kind == "circle":  # the centre and a point of the circle
            radius = math.dist(*points[:2])
            points = ellipse(points[0][0], points[0][1], radius, radius, 0)
        elif kind == "mask":  # its first and its last pixel
            (x0, y0), (x1, y1) = points[:2]
            points = [(x0, y0), (x1 + 1, y1 + 1)]
        group = entry.get("group_id")
        key = (number, None) if group is None else (str(entry["label"]), str(group))
        parts.setdefault(key, []).append((points, kind == "polygon"))
        places.setdefault(key, (entry["label"], where))
    _warn_left_out(path, left_out)
    objects = []
    for key, shapes in parts.items():
        polygons = [points for points, polygon in shapes if polygon]
        points = [point for part, _ in shapes for point in part]
        objects.append(
            shape(*places[key][:1], points, places[key][1], polygons if len(polygons) == len(shapes) else ())
        )
    size = document.get("imageWidth"), document.get("imageHeight")
    yield LabelledImage(path, [document["imagePath"], path.stem], size, objects)


def _cvat_images(path: Path) -> Iterator[LabelledImage]:
    """Yield the images of a file in CVAT's format for images."""
    left_out: Counter[str] = Counter()
    tree = parse_xml(path)
    if tree.find("track") is not None:
        raise UserError(f"{path} has tracks: export the task as 'CVAT for images'")
    for image in tree.iter("image"):
        objects = []
        for number, entry in enumerate(image, start=1):
            where = f"{path}, image '{image.get('name')}', shape {number}"

            def numbers(*names: str, entry: Any = entry, where: str = where) -> list[float]:
                return finite_numbers([entry.get(name, "0" if name == "rotation" else None) for name in names], where)

            polygon = False
            if entry.tag == "box":
                x0, y0, x1, y1, degrees = numbers("xtl", "ytl", "xbr", "ybr", "rotation")
                points = rotated(rectangle(x0, y0, x1, y1), ((x0 + x1) / 2, (y0 + y1) / 2), degrees)
            elif entry.tag == "ellipse":
                points = ellipse(*numbers("cx", "cy", "rx", "ry", "rotation"))
            elif entry.tag == "mask":
                x0, y0, width, height = numbers("left", "top", "width", "height")
                points = rectangle(x0, y0, x0 + width, y0 + height)
            elif entry.tag == "polygon":
                pairs = entry.get("points", "").split(";")
                points, polygon = [finite_numbers(pair.split(","), where, 2) for pair in pairs], True
            else:
                left_out[entry.tag] += entry.tag != "tag"  # a label of the whole image
                continue
            objects.append(shape(entry.get("label"), points, where, [points] if polygon else ()))
        size = image.get("width"), image.get("height")
        yield LabelledImage(path, [image.get("name", "")], size, objects, image.get("subset", ""))
    _warn_left_out(path, +left_out)


def _label_studio_images(path: Path) -> Iterator[LabelledImage]:
    """Yield the images of a JSON export of Label Studio; tasks without an annotation are left out.

    Of several annotations of a task, the first one marked as ground truth counts, or else the first one.
    """
    left_out: Counter[str] = Counter()
    unlabelled = 0
    for task in json.loads(path.read_bytes()):
        done = [annotation for annotation in task["annotations"] if not annotation.get("was_cancelled")]
        if not done:
            unlabelled += 1
            continue
        chosen = next((annotation for annotation in done if annotation.get("ground_truth")), done[0])
        objects: list[dict[str, Any]] = []
        size = None
        for number, result in enumerate(chosen["result"], start=1):
            value = result.get("value", {})
            names = next((value[key] for key in value if key.endswith("labels")), None)
            if names is None:  # the answer to a question, or a shape whose labels are in another result
                continue
            where = f"{path}, task {task.get('id')}, result {number}"
            if not isinstance(names, list):
                raise UserError(f"{where} has the labels {names!r}: write them as a list")
            points, polygon = _label_studio_shape(result, value, where)
            if not points:
                left_out[str(result.get("type"))] += 1
                continue
            size = result["original_width"], result["original_height"]
            objects += [shape(name, points, where, [points] if polygon else ()) for name in names]
        yield LabelledImage(path, _label_studio_names(task), size, objects)
    if unlabelled:
        logger.warning(f"{unlabelled} tasks of {path} have no annotation and are left out")
    _warn_left_out(path, left_out)


def _label_studio_shape(result: dict[str, Any], value: dict[str, Any], where: str) -> tuple[Points, bool]:
    """Return the points of a result, pixels, and whether it is a polygon; no points for other shapes.

    Coordinates are percentages of the image's width and height. A rectangle is rotated about its first corner.
    """
    kind = str(result.get("type"))
    if not {"x", "points"} & value.keys() or kind.startswith("keypoint"):
        return [], False
    width, height = (
        side / 100 for side in finite_numbers([result[f"original_{s}"] for s in ("width", "height")], where)
    )
    if "points" in value:
        pairs = [finite_numbers(pair, where, 2) for pair in value["points"]]
        return [(x * width, y * height) for x, y in pairs], True
    (degrees,) = finite_numbers([value.get("rotation") or 0], where)
    sides = ("radiusX", "radiusY") if "radiusX" in value else ("width", "height")
    x, y, w, h = finite_numbers([value[key] for key in ("x", "y", *sides)], where)
    x, y, w, h = x * width, y * height, w * width, h * height
    if "radiusX" in value:
        return ellipse(x, y, w, h, degrees), False
    return rotated(rectangle(x, y, x + w, y + h), (x, y), degrees), False


def _label_studio_names(task: dict[str, Any]) -> list[str]:
    """Return the paths of a task's image: of a link, of ``?d=`` of a local file, and without the prefix of uploads."""
    links = [value for value in task["data"].values() if isinstance(value, str)]
    names = []
    for link in links:
        parts = urlsplit(link)
        names += [*parse_qs(parts.query).get("d", []), unquote(parts.path)]
    names = [name for name in names if Path(name).suffix] or names
    return names + [UPLOAD.sub("", Path(name).name) for name in names]


def table_columns(path: Path) -> dict[str, str] | None:
    """Return the header of each of ``COLUMNS`` in a table, or None if one is missing."""
    header, _ = _header(path)
    found = {key: next((x for x in header if x.strip().lower() in names), None) for key, names in COLUMNS.items()}
    return None if None in found.values() else {key: str(name) for key, name in found.items()}


def _header(path: Path) -> tuple[list[str], str]:
    """Return the names of a table's columns and the delimiter."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline(10_000)
        delimiter = max(",;\t", key=line.count)
        return next(csv.reader([line], delimiter=delimiter), []), delimiter
    except (OSError, ValueError, csv.Error):
        return [], ","


def _table_images(path: Path) -> Iterator[LabelledImage]:
    """Yield the images of a table with a row for each box, corners in pixels; a row without both is an empty image."""
    columns = table_columns(path)
    if columns is None:
        raise ValueError("a column is missing")
    objects: dict[str, list[dict[str, Any]]] = {}
    sizes: dict[str, tuple[Any, Any]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter=_header(path)[1]), start=2):
            if not (image := row[columns["image"]] or ""):
                continue
            entries = objects.setdefault(image, [])
            sizes[image] = row.get("width"), row.get("height")
            where = f"{path}, line {number}"
            corners = [row[columns[key]] for key in ("xmin", "ymin", "xmax", "ymax")]
            if not (row[columns["name"]] or "").strip():
                if any(corners):
                    raise UserError(f"{where} has a box without a class: add the class, or remove the box")
                continue
            x0, y0, x1, y1 = finite_numbers(corners, where)
            box = [x0, y0, x1 - x0, y1 - y0]
            entries.append({"category_id": row[columns["name"]], "where": where, "bbox": box})
    for image, entries in objects.items():
        yield LabelledImage(path, [image], sizes[image], entries)


def _files(extension: str) -> Callable[[Path], Iterable[Path]]:
    return lambda root: (path for folder in folders_below(root) for path in files_with(folder, extension))


def _is_cvat(path: Path) -> bool:
    return re.search(rb"<annotations[\s>]", path.read_bytes()) is not None


def _has_keys(*keys: str) -> Callable[[Path], bool]:
    return lambda path: has_keys(path, keys)


LABELME = LabelFormat("LabelMe", json_files, _has_keys("shapes", "imagePath"), _labelme_image, per_image=True)
CVAT = LabelFormat("CVAT", _files(".xml"), _is_cvat, _cvat_images)
LABEL_STUDIO = LabelFormat("Label Studio", json_files, _has_keys("annotations", "result", "data"), _label_studio_images)
TABLE = LabelFormat("CSV", _files(".csv"), table_columns, _table_images)
