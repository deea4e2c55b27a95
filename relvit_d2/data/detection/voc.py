"""Annotations in PASCAL VOC's XML format: VOC itself and custom data sets."""

import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import ElementTree

from relvit_d2.data.cache import Labels, cached
from relvit_d2.data.detection.records import (
    BoxValidator,
    Record,
    check_unique,
    checked_box,
    checked_name,
    existing_images,
    files_with,
    first_few,
    folders_below,
    make_annotation,
    make_record,
    parse_flag,
    renumber_classes,
)
from relvit_d2.data.detection.splits import ALL, merge_single_split, splits_of_folders
from relvit_d2.data.images.decode import size_if_readable
from relvit_d2.data.images.folder import EXTENSIONS, list_images
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.paths import DataRoot, match_case, normal_form

SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc-kr": "cp949"}
"""The actual encoding of files that declare the first one (WHATWG, Encoding Standard, names and labels)."""

CORNERS = ("xmin", "ymin", "xmax", "ymax")
LISTS = ("train", "val", "trainval", "test")

BoxCheck = Callable[..., list[float] | None]

logger = logging.getLogger(__name__)


def load_voc(root: Path, split: str, class_names: Sequence[str], skip_missing: bool = False) -> list[Record]:
    """Read one split, in the order of its list.

    Boxes follow Detectron2: the file counts pixels from 1 and includes both ends, so 1 is subtracted from the minima
    and the maxima stay. Objects marked difficult are kept, with ``"difficult": 1``. Only an ``<object>`` that is a
    direct child of the root counts, with its own ``<bndbox>``: a ``<part>`` has another.

    Args:
        root: the folder that contains ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        split: name of a list in ``ImageSets/Main``, without ``.txt``.
        class_names: in the order of the category ids.
        skip_missing: see :func:`relvit_d2.data.detection.records.existing_images`.

    Returns:
        One record per image (see ``relvit_d2.data.detection.records``); ``image_id`` is the name without extension.

    Raises:
        UserError: a file is missing or damaged, a class is unknown, or a box is invalid.
    """
    images = voc_images(root, split, skip_missing)
    annotations = [root / "Annotations" / f"{image.stem}.xml" for image in images]
    DataRoot().check_links(annotations)

    def read() -> Labels:
        category_ids = {name: index for index, name in enumerate(class_names)}

        def category_id(name: str, where: str) -> int:
            if name not in category_ids:
                known = list(category_ids)
                raise UserError(
                    f"{where} has the class '{name}', which is not one of {', '.join(known)}: "
                    f"correct the file or CLASSES{nearest(name, known)}"
                )
            return category_ids[name]

        pairs = zip(annotations, images, strict=True)
        return (
            list(class_names),
            [_read_annotation(*pair, pair[1].stem, category_id, checked_box) for pair in pairs],
            [],
        )

    return cached(f"VOC {split} of {' '.join(class_names)}", root, [*annotations, *images], read)[1]


def voc_images(root: Path, split: str, skip_missing: bool = False) -> list[Path]:
    """Return the images of one split in the order of its list; no annotation is read.

    A line of the list is an id, or an id and a flag (VOC's lists of single classes). An id may have the extension of an
    image or ``.xml``; blank lines are skipped and Windows line endings are accepted.

    Raises:
        UserError: the list is missing or empty, an id occurs twice or is not a file name, or an image is missing.
    """
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    ids = _ids(path)
    images = [root / "JPEGImages" / f"{image_id}.jpg" for image_id in ids]
    return existing_images(images, str(path), skip_missing, DataRoot())


@dataclass(frozen=True)
class VocFolder:
    """A custom data set with an XML file for each image (``DATASETS.CUSTOM``, ``--data``).

    Attributes:
        root: the folder.
        sets: annotation files of each split.
        listed: whether the splits are given by lists, as in VOC.
    """

    root: Path
    sets: dict[str, list[Path]]
    listed: bool
    metrics = ("coco", "voc07")

    @classmethod
    def find(cls, root: Path) -> "VocFolder | None":
        """Return the data set in ``root``, or None if it contains no annotations in VOC's format.

        Its layout is either that of VOC (``Annotations``, ``JPEGImages`` and the lists of ``ImageSets/Main``), in
        ``root`` or in one folder at most two below, or XML files in any folders, whose names give the split. Case does
        not matter.

        Raises:
            UserError: several folders have VOC's layout, or labels are damaged.
        """
        listed = {folder: lists for folder in folders_below(root) if (lists := _lists(folder))}
        if len(listed) > 1 and root not in listed:
            first, second, *_ = listed
            raise UserError(f"'{first}' and '{second}' are both data sets in VOC's layout: use one of them as ROOT")
        if listed:
            folder, lists = next(iter(listed.items()))
            annotations = match_case(folder, "Annotations")
            known = {normal_form(path.stem): path for path in files_with(annotations, ".xml")}
            sets = {
                name: [known.get(i, annotations / f"{i}.xml") for i in _ids(path, root, known)]
                for name, path in lists.items()
            }
            return cls(folder, merge_single_split(sets), listed=True)
        found: dict[str, list[Path]] = {}
        data_root = DataRoot(root)
        folders = {folder: files for folder in folders_below(root) if (files := files_with(folder, ".xml"))}
        splits = splits_of_folders([folder.relative_to(root).parts for folder in folders])
        for split, files in zip(splits, folders.values(), strict=True):
            data_root.check_links(files)
            if any(map(_is_voc, files)):
                found.setdefault(split or ALL, []).extend(files)
        return cls(root, merge_single_split(found), listed=False) if found else None

    def classes(self) -> tuple[str, ...]:
        """Return the classes of all objects of all splits, in alphabetical order."""
        return tuple(self._labels[0])

    def records(self, split: str, classes: Sequence[str], skip_missing: bool) -> list[Record]:
        """Read one of ``sets``; boxes and difficult objects as in :func:`load_voc`."""
        images = self.images(split, skip_missing)
        names, records, _ = self._labels
        by_image = {record["file_name"]: record for record in records}
        return renumber_classes([by_image[str(image)] for image in images], names, classes, str(self.root))

    def images(self, split: str, skip_missing: bool) -> list[Path]:
        """List the images of one of ``sets``; no annotation is opened."""
        pairs, absent = self._pairs(self.sets[split])
        if absent and (not skip_missing or not pairs):
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise UserError(
                f"there is no image for the annotation {absent[0]}{more}: put it there, or set DATASETS.SKIP_MISSING "
                "True to leave out annotations without an image"
            )
        if absent:
            logger.warning(f"{len(absent)} annotations of '{self.root}' have no image: {first_few(absent)}")
        return [image for _, image in pairs]

    @cached_property
    def _labels(self) -> Labels:
        annotations = list(dict.fromkeys(path for files in self.sets.values() for path in files))
        pairs, _ = self._pairs(annotations)
        if not self.listed and (more := sum(map(len, self._images_by_stem.values())) - len(pairs)):
            logger.info(f"{more} images of '{self.root}' have no annotation file and are left out")

        def read() -> Labels:
            names: dict[str, int] = {}
            validator = BoxValidator(str(self.root))

            def category_id(name: str, where: str) -> int:
                return names.setdefault(name, len(names))

            records = [_read_annotation(*pair, self._image_id(pair[1]), category_id, validator) for pair in pairs]
            ordered = sorted(names)
            return ordered, renumber_classes(records, list(names), ordered, str(self.root)), validator.warnings()

        return cached("VOC annotations", self.root, [path for pair in pairs for path in pair], read)

    def _image_id(self, image: Path) -> str:
        return image.stem if self.listed else image.relative_to(self.root).with_suffix("").as_posix()

    @cached_property
    def _images_by_stem(self) -> dict[str, list[Path]]:
        images: dict[str, list[Path]] = {}
        folder = match_case(self.root, "JPEGImages")
        for image in list_images(folder if self.listed and folder.is_dir() else self.root):
            images.setdefault(normal_form(image.stem), []).append(image)
        return images

    def _pairs(self, annotations: Sequence[Path]) -> tuple[list[tuple[Path, Path]], list[Path]]:
        """Return the annotations with the images of the same name, and the annotations without an image."""
        pairs, absent = [], []
        for path in annotations:
            found = self._images_by_stem.get(normal_form(path.stem), [])
            if len(found) > 1:  # of images with one name in several folders, take the nearest
                shared = [(len(os.path.commonpath([path, image])), path.parent == image.parent) for image in found]
                found = [image for image, length in zip(found, shared, strict=True) if length == max(shared)]
            if len(found) > 1:
                raise UserError(f"'{found[0]}' and '{found[1]}' may both be the image of {path}: remove one")
            if found:
                pairs.append((path, found[0]))
            else:
                absent.append(path)
        DataRoot(self.root).check_links(path for pair in pairs for path in pair)
        check_unique([str(image) for _, image in pairs], f"'{self.root}'")
        return pairs, absent


def _lists(folder: Path) -> dict[str, Path]:
    """Return the lists of images of a folder in VOC's layout, by the name of the split."""
    lists = {name: match_case(folder, "ImageSets", "Main", f"{name}.txt") for name in LISTS}
    return {name: path for name, path in lists.items() if path.is_file() and match_case(folder, "Annotations").is_dir()}


def _is_voc(path: Path) -> bool:
    content = path.read_bytes().replace(b"\0", b"")  # UTF-16 has them between ASCII characters
    return re.search(rb"<annotation[\s>]", content) is not None  # CVAT's root is <annotations>


def _ids(path: Path, root: Path | None = None, known: Collection[str] = ()) -> list[str]:
    """Return the ids of one list of ``ImageSets/Main``; those in ``known`` may contain spaces and a file extension."""
    lines = DataRoot(root).read_text(path).splitlines()
    ids = [checked_name(_id(line.strip(), known), f"the image list {path}") for line in lines if line.strip()]
    if not ids:
        raise UserError(f"the image list {path} is empty: restore it")
    check_unique(ids, f"the image list {path}")
    return ids


def _id(line: str, known: Collection[str]) -> str:
    first = line.split()[0]
    names = [normal_form(name) for name in (line, line.rsplit(maxsplit=1)[0], first)]
    candidates = [form for name in names for form in (name, _without_extension(name))]
    return next((name for name in candidates if name in known), _without_extension(first))


def _without_extension(name: str) -> str:
    stem, extension = os.path.splitext(name)  # noqa: PTH122
    return stem if extension.lower() in (*EXTENSIONS, ".xml") else name


def parse_xml(path: Path) -> Element:
    """Return the root element of an XML file in the encoding that it declares.

    expat supports only a few encodings, none of them multi-byte; others are decoded here.
    """
    data = path.read_bytes()
    declared = re.match(rb"(?:\xef\xbb\xbf)?<\?xml[^>]*?encoding\s*=\s*[\"']([\w.-]+)[\"']", data)
    encoding = declared[1].decode("ascii", "replace").lower() if declared else "utf-8"
    if encoding.startswith(("utf", "iso-8859-1", "us-ascii", "ascii")):
        return ElementTree.fromstring(data)
    return ElementTree.fromstring(data.decode(SUPERSETS.get(encoding, encoding)))


def _read_annotation(
    path: Path, image: Path, image_id: str, category_id: Callable[[str, str], int], validator: BoxCheck
) -> Record:
    try:
        tree = parse_xml(path)
    except FileNotFoundError as error:
        raise UserError(f"the annotation {path} is missing: restore it") from error
    # defusedxml and undecodable bytes raise ValueErrors, an unknown encoding a LookupError.
    except (ParseError, OSError, ValueError, LookupError) as error:
        raise UserError(f"the annotation {path} is not valid XML ({error}): restore it") from error
    if isinstance(validator, BoxValidator) and tree.findtext("size/width", "0").strip() in ("0", ""):
        size = size_if_readable(image)  # some annotation programs write no size
    else:
        size = _side(tree, "width", path), _side(tree, "height", path)
    objects = [
        _read_object(element, size, f"{path}, object {number}", category_id, validator if size[0] else _no_box)
        for number, element in enumerate(tree.findall("object"), start=1)
    ]
    return make_record(image, image_id, size, [annotation for annotation in objects if annotation])


def _no_box(*_: object, **__: object) -> None:
    """Validate the boxes of an image that cannot be read, whose classes count all the same."""


def _read_object(
    element: Element, size: tuple[int, int], where: str, category_id: Callable[[str, str], int], validator: BoxCheck
) -> Record | None:
    name = _text(element, "name", where)
    category = category_id(name, where)
    box = element.find("bndbox")
    if box is None:
        raise UserError(f"{where} has no <bndbox>: add it or remove the object")
    where = f"{where} ({name})"
    difficult = parse_flag(element.findtext("difficult"))
    if difficult is None:
        raise UserError(f"{where} has <difficult> {element.findtext('difficult')!r}: set it to 0 or 1")
    corners = validator([_number(box, corner, where) for corner in CORNERS], *size, where, first_pixel=1)
    return None if corners is None else make_annotation(corners, category, difficult=difficult)


def _text(element: Element, tag: str, where: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise UserError(f"{where} has no <{tag}>: add it")
    if not text.isprintable():
        raise UserError(f"{where} has <{tag}> {text[:40]!r}, which cannot be printed: correct it")
    return text


def _number(element: Element, tag: str, where: str) -> float:
    text = _text(element, tag, where)
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{where} has <{tag}> {text!r}, which is not a number: correct it") from error


def _side(tree: Element, side: str, path: Path) -> int:
    value = _number(tree, f"size/{side}", str(path))
    if not (value >= 1 and value.is_integer()):
        raise UserError(f"{path} has <size/{side}> {value:g}: set it to an integer, in pixels")
    return int(value)
