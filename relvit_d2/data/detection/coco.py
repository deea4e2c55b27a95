"""COCO annotation files: JSON with images, annotations and categories, and the folders of the images."""

import json
import logging
import math
import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_util

from relvit_d2.data.detection.records import (
    BoxValidator,
    Record,
    check_unique,
    existing_images,
    files_with,
    folders_below,
    make_annotation,
    make_record,
    parse_flag,
    parse_integer,
)
from relvit_d2.data.detection.splits import merge_single_split, split_of, splits_of_folders
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import DataRoot, names_on_disk

KEYS = ("images", "annotations", "categories")
PROBED = 20  # images that are searched for to find their folder

logger = logging.getLogger(__name__)


def load_coco(
    json_file: Path,
    folder: Path,
    skip_missing: bool = False,
    classes: Sequence[str] | None = None,
    root: Path | None = None,
) -> list[Record]:
    """Read one annotation file, images in order of their ids.

    Category ids may be any integers; ``category_id`` is their index in ascending order. Polygons and RLEs become
    ``segmentation``; an annotation whose ``segmentation`` is empty or has no area gets a box only. Boxes are
    ``[x, y, width, height]`` from the image's edge. :class:`BoxValidator` handles invalid boxes.

    Args:
        json_file: the annotation file.
        folder: its file names are relative to this folder.
        skip_missing: see :func:`relvit_d2.data.detection.records.existing_images`.
        classes: the names that the file's categories must have, in the order of their ids; None accepts any.
        root: of a custom data set; see :class:`relvit_d2.utils.paths.DataRoot`.

    Returns:
        One record per image (see ``relvit_d2.data.detection.records``); ``image_id`` is that of the file.

    Raises:
        UserError: the file is missing or damaged, or an image is missing; the message names it.
    """
    document = _read(json_file)
    names, numbers = _categories(document, json_file)
    if classes is not None and names != list(classes):
        raise UserError(
            f"{json_file} has the categories {', '.join(names)}, not {', '.join(classes)}: use the same "
            "categories in all files, or set DATASETS.CUSTOM's CLASSES in the order of the ids"
        )
    images = _images(document, json_file, folder)
    present = set(existing_images(list(images.values()), str(json_file), skip_missing, DataRoot(root)))
    entries = {_image_id(entry.get("id")): entry for entry in document["images"]}
    records: dict[int | str, Record] = {
        key: make_record(path, key, _size(entries[key], json_file), [])
        for key, path in images.items()
        if path in present
    }
    validator = BoxValidator(str(json_file))
    seen: set[int] = set()
    for annotation in document["annotations"]:
        number = _integer(annotation, "id", f"an annotation of {json_file}")
        where = f"{json_file}, annotation {number}"
        if number in seen:
            raise UserError(f"{json_file} has two annotations with the id {number}: give each a unique id")
        seen.add(number)
        image = _image_id(annotation.get("image_id"))
        if image is None or image not in images:
            given = annotation.get("image_id")
            raise UserError(f"{where} is of the image {given!r}, which the file does not list: correct or remove it")
        if image in records:
            record = records[image]
            where = f"{where} ({Path(record['file_name']).name})"
            if valid := read_annotation(annotation, record, numbers, validator, where):
                record["annotations"].append(valid)
    for warning in validator.warnings():
        logger.warning(warning)
    return list(records.values())


def coco_classes(json_file: Path) -> tuple[str, ...]:
    """Return the names of an annotation file's categories in the order of their ids.

    Raises:
        UserError: the file is missing or damaged.
    """
    return tuple(_categories(_read(json_file), json_file)[0])


def coco_images(json_file: Path, folder: Path, skip_missing: bool = False, root: Path | None = None) -> list[Path]:
    """Return the images that an annotation file lists, in order of their ids; see :func:`load_coco`."""
    images = _images(_read(json_file), json_file, folder)
    return existing_images(list(images.values()), str(json_file), skip_missing, DataRoot(root))


@dataclass(frozen=True)
class CocoFolder:
    """A custom data set with COCO annotation files (``DATASETS.CUSTOM``, ``--data``).

    Attributes:
        root: the folder.
        sets: annotation file and image folder of each split.
    """

    root: Path
    sets: dict[str, tuple[Path, Path]]
    metrics = ("coco",)

    @classmethod
    def find(cls, root: Path, json_file: str = "", images: str = "") -> "CocoFolder | None":
        """Return the data set in ``root``, or None if it contains no annotation file.

        Files are searched for in ``root`` and up to two folders below. The split is taken from the name of the file, or
        else from the names of its folders. The image folder is the one in which most of the file names exist.

        Args:
            root: the folder.
            json_file: the only annotation file, relative to ``root``; "" searches for it.
            images: the folder that file names are relative to, itself relative to ``root``; "" searches for it.
        """
        data_root = DataRoot(root)
        files = [data_root.resolve(json_file, "JSON")] if json_file else json_files(root)
        data_root.check_links(files)
        if not json_file:
            files = [path for path in files if has_keys(path, KEYS)]
            # COCO's captions and keypoints of the same images are in files beside the instances.
            files = [path for path in files if path.name.startswith("instances_")] or files
        if not files:
            return None
        sets: dict[str, Path] = {}
        folders = splits_of_folders([path.parent.relative_to(root).parts for path in files])
        for path, above in zip(files, folders, strict=True):
            split = split_of(path.stem) or above or path.stem
            if split in sets:
                raise UserError(
                    f"'{sets[split]}' and '{path}' are both annotation files of one split: name one under JSON in "
                    "DATASETS.CUSTOM, or remove one"
                )
            sets[split] = path
        folder = data_root.resolve(images, "IMAGES") if images else None
        located = {split: (path, folder or _image_folder(root, path)) for split, path in sets.items()}
        return cls(root, merge_single_split(located))

    def classes(self) -> tuple[str, ...]:
        """Return the categories of the first file in the order of their ids."""
        return coco_classes(next(iter(self.sets.values()))[0])

    def records(self, split: str, classes: Sequence[str], skip_missing: bool) -> list[Record]:
        """Read one of ``sets``: see :func:`load_coco`."""
        return load_coco(*self.sets[split], skip_missing, classes, self.root)

    def images(self, split: str, skip_missing: bool) -> list[Path]:
        """List the images of one of ``sets``."""
        return coco_images(*self.sets[split], skip_missing, self.root)


def without_categories(root: Path) -> list[Path]:
    """Return the annotation files that :meth:`CocoFolder.find` ignores because they have no categories."""
    files = [path for path in json_files(root) if not path.is_symlink()]
    return [path for path in files if has_keys(path, KEYS[:2]) and not has_keys(path, KEYS[2:])]


def json_files(root: Path) -> list[Path]:
    """Return the JSON files in a folder and up to two folders below."""
    return [path for folder in folders_below(root) for path in files_with(folder, ".json")]


def has_keys(path: Path, keys: Sequence[str]) -> bool:
    """Whether a JSON file contains the keys; it is searched, not parsed, since it may have hundreds of megabytes."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(f'"{key}"'.encode()) >= 0 for key in keys)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False


def _image_folder(root: Path, json_file: Path) -> Path:
    """Return the folder that contains most of the first images of an annotation file."""
    try:
        names = [entry["file_name"] for entry in _read(json_file)["images"][:PROBED]]
    except (KeyError, TypeError) as error:
        raise _damaged(json_file, error) from error
    split = split_of(json_file.stem) or split_of(json_file.parent.name)

    def matches(folder: Path) -> tuple[int, bool, bool]:
        paths = [DataRoot(root).resolve(name, str(json_file), folder) for name in names]
        count = sum(path.is_file() for path in names_on_disk(paths, folder))
        return count, split_of(folder.name) == split, folder == json_file.parent

    return max(folders_below(root), key=matches)


def _read(json_file: Path) -> dict[str, Any]:
    try:
        document = json.loads(json_file.read_bytes())
        for key in KEYS:
            if not isinstance(document[key], list) or not all(isinstance(entry, dict) for entry in document[key]):
                raise TypeError(f"{key} must be a list of objects")
    except FileNotFoundError as error:
        raise UserError(f"the annotation file {json_file} is missing: put it there") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise _damaged(json_file, error) from error
    return document


def _damaged(json_file: Path, error: Exception) -> UserError:
    reason = f"no '{error.args[0]}'" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return UserError(f"{json_file} is damaged or not a COCO annotation file ({reason}): restore it")


def _categories(document: dict[str, Any], json_file: Path) -> tuple[list[str], dict[int, int]]:
    """Return the class names in ascending order of the categories' ids, and the class index of each id.

    Some programs add a root category that is the ``supercategory`` of the others; where it has the name of one of them,
    both are one class.
    """
    names: dict[int, str] = {}
    parents: dict[int, Any] = {}
    for category in document["categories"]:
        number, name = _integer(category, "id", f"a category of {json_file}"), category.get("name")
        if number in names:
            raise UserError(f"{json_file} has two categories with the id {number}: give each a unique id")
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise UserError(f"{json_file} has a category {number} with the name {name!r}: give it a printable name")
        names[number], parents[number] = name, category.get("supercategory")
    roots = {number for number, name in names.items() if parents[number] != name and name in map(str, parents.values())}
    counts = Counter(names.values())
    kept = {number: name for number, name in sorted(names.items()) if not (number in roots and counts[name] > 1)}
    kept_counts = Counter(kept.values())
    if repeated := [name for name in names.values() if kept_counts[name] != 1]:
        raise UserError(f"{json_file} has two categories with the name '{repeated[0]}': give each a unique name")
    if not names:
        raise UserError(f"{json_file} has no categories: list id and name of each class")
    indices = {name: index for index, name in enumerate(kept.values())}
    return list(indices), {number: indices[name] for number, name in names.items()}


def _images(document: dict[str, Any], json_file: Path, folder: Path) -> dict[int | str, Path]:
    """Return the paths of the images by their ids, in ascending order."""
    images: dict[int | str, Path] = {}
    for entry in document["images"]:
        key = _image_id(entry.get("id"))
        if key is None:
            raise UserError(f"{json_file} has an image with the id {entry.get('id')!r}: give it an integer or text")
        if key in images:
            raise UserError(f"{json_file} has two images with the id {key!r}: give each a unique id")
        images[key] = DataRoot().resolve(entry.get("file_name"), f"{json_file}, image {key!r},", folder)
    if not images:
        raise UserError(f"{json_file} lists no images: add them, or use another file")
    images = dict(zip(images, names_on_disk(images.values(), folder), strict=True))
    check_unique([str(path) for path in images.values()], str(json_file))
    if len({type(key) for key in images}) > 1:
        raise UserError(f"{json_file} has image ids that are numbers and image ids that are text: use one kind")
    return dict(sorted(images.items()))


def _image_id(value: Any) -> int | str | None:
    return value if isinstance(value, str) else parse_integer(value)


def read_annotation(
    annotation: dict[str, Any], record: Record, numbers: dict[int, int], validator: BoxValidator, where: str
) -> dict[str, Any] | None:
    """Return an annotation of a COCO file as one of a record, or None for a box without area.

    Args:
        annotation: with ``category_id``, ``bbox``, and optionally ``segmentation`` and ``iscrowd``.
        record: of the image.
        numbers: index of the class by category id.
        validator: of the box.
        where: the position in the file, for messages.

    Raises:
        UserError: a value is invalid.
    """
    category, crowd = parse_integer(annotation.get("category_id")), parse_flag(annotation.get("iscrowd"))
    if category is None or category not in numbers:
        raise UserError(
            f"{where} has the category {annotation.get('category_id')!r}, which is not in the file's categories: "
            "correct it"
        )
    if crowd is None:
        raise UserError(f"{where} has iscrowd {annotation['iscrowd']!r}: set it to 0 or 1")
    x, y, width, height = finite_numbers(annotation.get("bbox"), where, 4)
    if width < 0 or height < 0:
        raise UserError(f"{where} has the box {annotation['bbox']}, of negative width or height: correct or remove it")
    size = record["width"], record["height"]
    box = validator([x, y, x + width, y + height], *size, where)
    if box is None:
        return None
    result = make_annotation(box, numbers[category], crowd)
    if annotation.get("segmentation"):
        if mask := _segmentation(annotation["segmentation"], *size, where):
            result["segmentation"] = mask
        else:
            validator.count_empty_mask(where)
    return result


def _segmentation(given: Any, width: int, height: int, where: str) -> list[list[float]] | dict[str, Any] | None:
    """Return the polygons that have an area, or an RLE of the image's size; None or [] for an empty mask."""
    if isinstance(given, list):
        polygons = [finite_numbers(polygon, where) for polygon in given]
        limit = max(width, height)
        if any(not -limit <= value <= 2 * limit for polygon in polygons for value in polygon):
            raise UserError(f"{where} has a polygon far outside its image of {width} x {height} pixels: correct it")
        # Detectron2 drops polygons of fewer than three points too (data/datasets/coco.py, load_coco_json).
        return [
            polygon
            for polygon in polygons
            if len(polygon) % 2 == 0 and len(polygon) >= 6 and len(set(polygon[::2])) > 1 < len(set(polygon[1::2]))
        ]
    try:
        if list(given["size"]) != [height, width]:
            raise ValueError(f"its size is {given['size']}")
        counts = given["counts"]
        if isinstance(counts, list):
            if sum(counts) != width * height or min(counts) < 0:
                raise ValueError("its runs do not fill the image")
            if not sum(counts[1::2]):
                return None
            return mask_util.frPyObjects(given, height, width) | {"size": [height, width]}
        if not isinstance(counts, str) or not counts.isascii():
            raise ValueError("its counts are neither a list of numbers nor text")
        runs = _runs(counts)
        if sum(runs) != width * height:
            raise ValueError("its runs do not fill the image")
        return None if not sum(runs[1::2]) else {"size": [height, width], "counts": counts}
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise UserError(f"{where} has a mask that is not an RLE of its image's size ({error}): correct it") from error


def _runs(counts: str) -> list[int]:
    """Return the run lengths of a compressed RLE: pixels off, on, off, ...

    pycocotools does not validate the text, and invalid text makes it write outside its buffer. A number is stored in
    groups of five bits, low bits first; the sixth bit of a group is set where more groups follow, and the fifth bit of
    the last group is the sign. From the fourth run on, the number is the difference from the run two before (maskApi.c,
    rleFrString).
    """
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("a character that is not valid in an RLE")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        value -= (bits & 0x10) << (shift - 4)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            raise ValueError("a run of negative length")
        value = shift = 0
    if shift:
        raise ValueError("its last run is cut short")
    return runs


def finite_numbers(given: Any, where: str, count: int | None = None) -> list[float]:
    """Return a list of numbers as floats; raise a ``UserError`` if it is none, or not of the length ``count``."""
    try:
        values = [float(value) for value in given]
        if isinstance(given, list) and all(map(math.isfinite, values)) and count in (None, len(values)):
            return values
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{where} has {str(given)[:60]} instead of {count or 'a list of'} finite numbers: correct it")


def _integer(entry: dict[str, Any], key: str, where: str) -> int:
    value = parse_integer(entry.get(key))
    if value is None:
        raise UserError(f"{where} has the {key} {entry.get(key)!r}: give it an integer")
    return value


def _size(entry: dict[str, Any], json_file: Path) -> tuple[int, int]:
    where = f"the image {entry['id']!r} of {json_file}"
    sizes = {key: _integer(entry, key, where) for key in ("height", "width")}
    for key, value in sizes.items():
        if not 1 <= value < 2**31:
            raise UserError(f"{where} has the {key} {value}: set it to the size in pixels")
    return sizes["width"], sizes["height"]
