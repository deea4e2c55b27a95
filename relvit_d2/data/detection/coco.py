"""COCO annotation files: one json of images, annotations and categories, beside folders of images."""

import json
import logging
import math
import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from relvit_d2.data.detection.records import (
    BoxValidator,
    Record,
    check_unique,
    checked_path,
    existing,
    files_with,
    folders_below,
    parse_flag,
    parse_whole_number,
)
from relvit_d2.data.detection.splits import one_or_split, split_of, splits_of_folders
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import names_on_disk, refuse_links_out

KEYS = (b'"images"', b'"annotations"', b'"categories"')
TRIED = 20  # images that are searched for to find their folder

logger = logging.getLogger(__name__)


def load_coco(
    json_file: Path,
    folder: Path,
    skip_missing: bool = False,
    classes: Sequence[str] | None = None,
    root: Path | None = None,
) -> list[Record]:
    """Read one annotation file, images in order of their ids.

    Category ids may be any whole numbers; ``category_id`` is their place in ascending order. Polygons become
    ``segmentation``, and so does an RLE; an annotation whose ``segmentation`` is empty or covers nothing has a box
    only. Boxes are ``[x, y, width, height]`` from the image's edge. :class:`BoxValidator` handles invalid ones.

    Args:
        json_file: the annotation file.
        folder: what its file names start from.
        skip_missing: see :func:`relvit_d2.data.detection.records.existing`.
        classes: names that the file's categories must have, in the order of their ids; None takes any.
        root: of a user's own data; see :func:`relvit_d2.utils.paths.refuse_links_out`.

    Returns:
        One record an image (see ``relvit_d2.data.detection.records``); ``image_id`` is the file's.

    Raises:
        UserError: the file is missing or damaged, or an image is missing; the message names it.
    """
    document = _read(json_file)
    names, numbers = _categories(document, json_file)
    if classes is not None and names != list(classes):
        raise UserError(
            f"{json_file} has the categories {', '.join(names)}, not {', '.join(classes)}: give files with "
            "one list of categories, or DATASETS.CUSTOM's CLASSES in the order of the ids"
        )
    images = _images(document, json_file, folder)
    paths = existing(list(images.values()), str(json_file), skip_missing, root)
    present = set(paths)
    entries = {_image_id(entry.get("id")): entry for entry in document["images"]}
    records: dict[int | str, Record] = {
        key: {
            "file_name": str(path),
            "image_id": key,
            "height": _side(entries[key], "height", json_file),
            "width": _side(entries[key], "width", json_file),
            "annotations": [],
        }
        for key, path in images.items()
        if path in present
    }
    validator = BoxValidator(str(json_file))
    seen: set[int] = set()
    for annotation in document["annotations"]:
        number = _whole(annotation, "id", f"an annotation of {json_file}")
        where = f"{json_file}, annotation {number}"
        if number in seen:
            raise UserError(f"{json_file} has two annotations with the id {number}: give each its own")
        seen.add(number)
        image = _image_id(annotation.get("image_id"))
        if image is None or image not in images:
            given = annotation.get("image_id")
            raise UserError(f"{where} is of the image {given!r}, which the file does not list: correct or remove it")
        if image in records:
            record = records[image]
            if thing := _thing(annotation, record, numbers, validator, f"{where} ({Path(record['file_name']).name})"):
                record["annotations"].append(thing)
    for note in validator.notes():
        logger.warning(note)
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
    return existing(list(images.values()), str(json_file), skip_missing, root)


@dataclass(frozen=True)
class CocoFolder:
    """A folder with annotation files: ``DATASETS.CUSTOM``'s and ``--data``'s.

    Attributes:
        root: the folder.
        sets: annotation file and image folder of each split.
    """

    root: Path
    sets: dict[str, tuple[Path, Path]]
    metrics = ("coco",)

    @classmethod
    def find(cls, root: Path, json_file: str = "", images: str = "") -> "CocoFolder | None":
        """Return what lies in ``root``, or None if no file there is an annotation file.

        Files are searched for in ``root`` and two folders below; the split is that in the name of the file, or else in
        the names of its folders. Images are searched for where their names lead to files.

        Args:
            root: the folder.
            json_file: the one annotation file, relative to ``root``; "" looks for it.
            images: the folder that file names start from, relative to ``root``; "" looks for it.
        """
        if json_file:
            files = [checked_path(json_file, root, "JSON")]
            refuse_links_out(files, root)
        else:
            files = _json_files(root)
            refuse_links_out(files, root)
            files = [path for path in files if _has_keys(path, KEYS)]
            # COCO's own come with captions and keypoints of the same images beside them.
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
                    "DATASETS.CUSTOM, or take one away"
                )
            sets[split] = path
        given = checked_path(images, root, "IMAGES") if images else None
        return cls(
            root, one_or_split({split: (path, given or _image_folder(root, path)) for split, path in sets.items()})
        )

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
    """Return the annotation files that :meth:`CocoFolder.find` passes over since they have no categories."""
    files = [path for path in _json_files(root) if not path.is_symlink()]
    return [path for path in files if _has_keys(path, KEYS[:2]) and not _has_keys(path, KEYS[2:])]


def _json_files(root: Path) -> list[Path]:
    return [path for folder in folders_below(root) for path in files_with(folder, ".json")]


def _has_keys(path: Path, keys: Sequence[bytes]) -> bool:
    """Whether a json holds the keys; it is searched, not parsed, since it may be of hundreds of megabytes."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(key) >= 0 for key in keys)
    except (OSError, ValueError):  # an empty file has no map
        return False


def _image_folder(root: Path, json_file: Path) -> Path:
    """Return the folder in which most of the first images of an annotation file lie."""
    try:
        names = [entry["file_name"] for entry in _read(json_file)["images"][:TRIED]]
    except (KeyError, TypeError) as error:
        raise _damaged(json_file, error) from error
    own = split_of(json_file.stem) or split_of(json_file.parent.name)

    def found(folder: Path) -> tuple[int, bool, bool]:
        paths = [checked_path(name, folder, str(json_file)) for name in names]
        hits = sum(path.is_file() for path in names_on_disk(paths, folder))
        return hits, split_of(folder.name) == own, folder == json_file.parent

    return max(folders_below(root), key=found)


def _read(json_file: Path) -> dict[str, Any]:
    try:
        document = json.loads(json_file.read_bytes())
        if not all(isinstance(document[key], list) for key in ("images", "annotations", "categories")):
            raise TypeError("images, annotations and categories must be lists")
        for key in ("images", "annotations", "categories"):
            if not all(isinstance(entry, dict) for entry in document[key]):
                raise TypeError(f"{key} holds what is no object")
    except FileNotFoundError as error:
        raise UserError(f"the annotation file {json_file} is missing: put it there") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise _damaged(json_file, error) from error
    return document


def _damaged(json_file: Path, error: Exception) -> UserError:
    reason = f"no '{error.args[0]}'" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return UserError(f"{json_file} is damaged or no COCO annotation file ({reason}): restore it")


def _categories(document: dict[str, Any], json_file: Path) -> tuple[list[str], dict[int, int]]:
    """Return the names of the classes in ascending order of the categories' ids, and the class of each id.

    Some programs add a root category that the others have as ``supercategory`` and that may have the name of one of
    them; the two are one class.
    """
    names: dict[int, str] = {}
    parents: dict[int, Any] = {}
    for category in document["categories"]:
        number, name = _whole(category, "id", f"a category of {json_file}"), category.get("name")
        if number in names:
            raise UserError(f"{json_file} has two categories with the id {number}: give each its own")
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise UserError(f"{json_file} has a category {number} with the name {name!r}: give it one in letters")
        names[number], parents[number] = name, category.get("supercategory")
    roots = {number for number, name in names.items() if parents[number] != name and name in map(str, parents.values())}
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    kept = {number: name for number, name in sorted(names.items()) if not (number in roots and name in twice)}
    often = Counter(kept.values())
    if several := [name for name in names.values() if often[name] != 1]:
        raise UserError(f"{json_file} has two categories with the name '{several[0]}': give each its own")
    if not names:
        raise UserError(f"{json_file} has no categories: list what the objects can be")
    places = {name: place for place, name in enumerate(kept.values())}
    return list(places), {number: places[name] for number, name in names.items()}


def _images(document: dict[str, Any], json_file: Path, folder: Path) -> dict[int | str, Path]:
    """Return the paths of the images by their ids, in ascending order."""
    images: dict[int | str, Path] = {}
    for entry in document["images"]:
        key = _image_id(entry.get("id"))
        if key is None:
            raise UserError(f"{json_file} has an image with the id {entry.get('id')!r}: give it a whole number or text")
        if key in images:
            raise UserError(f"{json_file} has two images with the id {key!r}: give each its own")
        images[key] = checked_path(entry.get("file_name"), folder, f"{json_file}, image {key!r},")
    if not images:
        raise UserError(f"{json_file} lists no images")
    images = dict(zip(images, names_on_disk(images.values(), folder), strict=True))
    check_unique([str(path) for path in images.values()], str(json_file))
    if len({type(key) for key in images}) > 1:
        raise UserError(f"{json_file} has images with numbers for ids and images with texts: give all the same kind")
    return dict(sorted(images.items()))


def _image_id(value: Any) -> int | str | None:
    return value if isinstance(value, str) else parse_whole_number(value)


def _thing(
    annotation: dict[str, Any], record: Record, numbers: dict[int, int], validator: BoxValidator, where: str
) -> dict[str, Any] | None:
    category, crowd = parse_whole_number(annotation.get("category_id")), parse_flag(annotation.get("iscrowd"))
    if category is None or category not in numbers:
        raise UserError(
            f"{where} has the category {annotation.get('category_id')!r}, which is not in the file's categories: "
            "correct it"
        )
    if crowd is None:
        raise UserError(f"{where} has iscrowd {annotation['iscrowd']!r}: it must be 0 or 1")
    x, y, width, height = _finite(annotation.get("bbox"), where, 4)
    if width < 0 or height < 0:
        raise UserError(f"{where} has the box {annotation['bbox']}, of negative width or height: correct or remove it")
    size = record["width"], record["height"]
    box = validator([x, y, x + width, y + height], *size, where)
    if box is None:
        return None
    thing = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": numbers[category], "iscrowd": crowd}
    if annotation.get("segmentation"):
        if mask := _segmentation(annotation["segmentation"], *size, where):
            thing["segmentation"] = mask
        else:
            validator.without_mask(where)
    return thing


def _segmentation(given: Any, width: int, height: int, where: str) -> list[list[float]] | dict[str, Any] | None:
    """Return the polygons that have an area, or an RLE of the image's size; None or [] if nothing is covered."""
    if isinstance(given, list):
        polygons = [_finite(polygon, where) for polygon in given]
        limit = max(width, height)
        if any(not -limit <= value <= 2 * limit for polygon in polygons for value in polygon):
            raise UserError(f"{where} has a polygon far outside its image of {width} x {height} pixels: correct it")
        # Detectron2 drops those of fewer than three points too (data/datasets/coco.py, load_coco_json).
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
            raise ValueError("its counts are neither numbers nor text")
        runs = _runs(counts)
        if sum(runs) != width * height:
            raise ValueError("its runs do not fill the image")
        return None if not sum(runs[1::2]) else {"size": [height, width], "counts": counts}
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise UserError(f"{where} has a mask that is no RLE of its image's size ({error}): correct it") from error


def _runs(counts: str) -> list[int]:
    """Return the runs of a compressed RLE: pixels off, on, off, ...

    pycocotools trusts the text and writes beyond its memory where it lies. A run is a number in groups of five bits,
    low ones first, with a sixth bit where more follow and the sign in the last group's fifth; from the third on it is
    the difference from the run two before (maskApi.c, rleFrString).
    """
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("a letter that no RLE has")
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


def _finite(given: Any, where: str, count: int | None = None) -> list[float]:
    try:
        values = [float(value) for value in given]
        if isinstance(given, list) and all(map(math.isfinite, values)) and count in (None, len(values)):
            return values
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{where} has {str(given)[:60]} where {count or 'a list of'} finite numbers belong: correct it")


def _whole(entry: dict[str, Any], key: str, where: str) -> int:
    value = parse_whole_number(entry.get(key))
    if value is None:
        raise UserError(f"{where} has the {key} {entry.get(key)!r}: give it a whole number")
    return value


def _side(entry: dict[str, Any], key: str, json_file: Path) -> int:
    value = _whole(entry, key, f"the image {entry['id']!r} of {json_file}")
    if not 1 <= value < 2**31:
        raise UserError(f"the image {entry['id']!r} of {json_file} has the {key} {value}: give its size in pixels")
    return value
