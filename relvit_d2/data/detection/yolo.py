"""YOLO labels in Ultralytics' layout: a text file for each image, beside it or in ``labels`` instead of ``images``.

A line is ``class x y width height`` with the box's centre and size, or ``class x y x y x y ...`` with the corners of a
polygon, all relative to the image's width and height. If ``data.yaml`` has ``kpt_shape``, key points follow the box.
"""

import logging
import math
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from relvit_d2.data.detection.data_yaml import Description, read_description
from relvit_d2.data.detection.records import (
    BoxValidator,
    Record,
    check_printable,
    check_unique,
    existing_images,
    first_few,
    make_annotation,
    make_record,
    parse_integer,
    renumber_classes,
)
from relvit_d2.data.detection.splits import ALL, merge_single_split, splits_of_folders
from relvit_d2.data.images.folder import files_below, image_sizes, is_image
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import DataRoot, normal_form, relative_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class YoloFolder:
    """A custom data set with YOLO labels (``DATASETS.CUSTOM``, ``--data``).

    Attributes:
        root: the folder.
        sets: images of each split.
        description: class names and key points from ``data.yaml`` and similar files.
        label_files: the text files of the folder, relative to it, by :func:`_key`.
    """

    root: Path
    sets: dict[str, list[Path]]
    description: Description
    label_files: dict[str, str]
    metrics = ("coco",)

    @classmethod
    def find(cls, root: Path) -> "YoloFolder | None":
        """Return the data set in ``root``, or None if no image in it has labels.

        The splits are those of ``data.yaml``, or else those in the names of the folders: ``images/train`` or
        ``train/images``.

        Raises:
            UserError: the description is invalid, or an image has a name that cannot be printed.
        """
        start = len(os.path.join(root, ""))  # noqa: PTH118
        files = [path[start:] for path in files_below(root, [])]  # strings: a Path takes 20 times as long to create
        images = list(filter(is_image, files))
        texts = [name for name in files if name.lower().endswith(".txt")]
        texts.sort(key=lambda name: name.endswith(".txt"))  # the usual spelling comes last and takes precedence
        label_files = {_key(name): name for name in texts}
        found = cls(root, {}, Description(), label_files)
        if not any(map(found._label, images)):
            return None
        check_printable(images)
        description = read_description(root, files)
        sets = description.sets
        if not sets:
            sets = {}
            folders = splits_of_folders([image.split("/")[:-1] for image in images])
            for image, split in zip(images, folders, strict=True):
                sets.setdefault(split or "", []).append(image)
            if len(sets) > 1 and (rest := sets.pop("", [])):
                logger.info(
                    f"{len(rest)} images of '{root}' are not in a folder of a split and are left out: {first_few(rest)}"
                )
        elif rest := sorted(set(images) - set(chain.from_iterable(sets.values()))):
            logger.info(
                f"{len(rest)} images of '{root}' are not in a split of data.yaml and are left out: {first_few(rest)}"
            )
        if len(sets) > 1 and not any(map(found._label, sets.get("test", images))):
            logger.warning(f"the {len(sets.pop('test'))} test images of '{root}' have no labels and are left out")
        first = next(iter(sets.values()))
        if len(sets) > 1 and all(set(part) == set(first) for part in sets.values()):  # train and val are one folder
            sets = {ALL: first}
        parts = {split: [root / image for image in part] for split, part in merge_single_split(sets).items()}
        return cls(root, parts, description, label_files)

    def classes(self) -> tuple[str, ...]:
        """Return the class names of ``data.yaml`` or ``classes.txt``, or else the class numbers in the labels."""
        if not self.description.names:
            _warn_unnamed_classes(self.root)
        return tuple((self.description.names or self._class_numbers()).values())

    def records(self, split: str, classes: Sequence[str], skip_missing: bool) -> list[Record]:
        """Read one of ``sets``; an image without labels has no objects; ``BoxValidator`` handles invalid boxes."""
        images = self.images(split, skip_missing)
        labels = self._labels(images)
        DataRoot(self.root).check_links(labels)
        if not any(label.is_file() for label in labels):
            raise UserError(
                f"no image of the split '{split}' of '{self.root}' has a label file: put the label files there"
            )
        keypoints = self.description.keypoints
        names = self.description.names or self._class_numbers()
        if not self.description.names and list(names.values()) != list(classes):
            names = dict(enumerate(classes))
        category_ids = {number: index for index, number in enumerate(names)}
        validator = BoxValidator(str(self.root))
        ids = map(_stem, relative_names(images, self.root))
        records = [
            make_record(image, image_id, size, _annotations(label, size, category_ids, keypoints, validator))
            for image, image_id, size, label in zip(images, ids, image_sizes(images), labels, strict=True)
        ]
        for warning in validator.warnings():
            logger.warning(warning)
        if keypoints:
            logger.warning(f"key points of '{self.root}' are not used, only the boxes")
        return renumber_classes(records, list(names.values()), classes, str(self.root))

    def images(self, split: str, skip_missing: bool) -> list[Path]:
        """List the images of one of ``sets``; no label is read."""
        where = f"the split '{split}' of '{self.root}'"
        images = existing_images(self.sets[split], where, skip_missing, DataRoot(self.root))
        check_unique([_stem(name) for name in relative_names(images, self.root)], f"'{self.root}'")
        return images

    def _label(self, image: str) -> str | None:
        """Return the label file of an image: in ``labels`` in place of ``images``, or else beside the image."""
        folder, slash, stem = (key := _key(image)).rpartition("/")
        return self.label_files.get(f"{_label_folder(folder)}{slash}{stem}") or self.label_files.get(key)

    def _labels(self, images: Sequence[Path]) -> list[Path]:
        """Return the label files of images; those of images without labels do not exist."""
        names = relative_names(images, self.root)
        return [self.root / (self._label(name) or f"{_stem(name)}.txt") for name in names]

    def _class_numbers(self) -> dict[int, str]:
        files = self._labels(list(chain.from_iterable(self.sets.values())))
        DataRoot(self.root).check_links(files)
        numbers = {_class_number(fields, where) for file in files for fields, where in _lines(file)}
        return {number: str(number) for number in sorted(numbers)}


@cache  # once per run
def _warn_unnamed_classes(root: Path) -> None:
    logger.warning(f"no data.yaml or classes.txt in '{root}' names the classes: their numbers are used as names")


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _key(name: str) -> str:
    """Return a relative path in NFC, without extension, folders ``images`` and ``labels`` in lower case."""
    folder, slash, stem = normal_form(_stem(name)).rpartition("/")
    return f"{_lower_case(folder)}{slash}{stem}"


@cache
def _lower_case(folder: str) -> str:
    return "/".join(x.lower() if x.lower() in ("images", "labels") else x for x in folder.split("/"))


@cache
def _label_folder(folder: str) -> str:
    """Return a folder with ``labels`` in place of the last ``images``."""
    above, found, below = f"/{folder}/".rpartition("/images/")
    return f"{above}/labels/{below}"[1:-1] if found else folder


def _lines(path: Path) -> list[tuple[list[str], str]]:
    """Return the fields of each line that is not empty, and its position for messages; [] if there is no file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the label file {path} cannot be read ({type(error).__name__}): restore it") from error
    return [(line.split(), f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _class_number(fields: list[str], where: str) -> int:
    number = parse_integer(fields[0])
    if number is None or number < 0:
        raise UserError(f"{where} begins with {fields[0][:20]!r}: it must begin with the number of a class")
    return number


def _annotations(
    label: Path, size: tuple[int, int], category_ids: dict[int, int], keypoints: int, validator: BoxValidator
) -> list[Record]:
    lines = _lines(label) if size[0] else []
    objects = [_annotation(*line, size, category_ids, keypoints, validator) for line in lines]
    return [annotation for annotation in objects if annotation]


def _annotation(
    fields: list[str],
    where: str,
    size: tuple[int, int],
    category_ids: dict[int, int],
    keypoints: int,
    validator: BoxValidator,
) -> Record | None:
    number = _class_number(fields, where)
    if number not in category_ids:
        known = list(category_ids)
        named = ", ".join(map(str, known)) if len(known) < 9 else f"{known[0]} to {known[-1]}"
        raise UserError(
            f"{where} has the class {number}, but only the classes {named} have a name: name it or correct it"
        )
    try:
        values = [float(text) for text in fields[1:]]
    except ValueError as error:
        raise UserError(f"{where} has a value that is not a number: correct it") from error
    if keypoints and len(values) not in (4, 4 + keypoints):
        raise UserError(
            f"{where} has {len(values)} numbers after the class: with the kpt_shape of data.yaml a box has 4 and its "
            f"key points {keypoints}"
        )
    values = values[:4] if keypoints else values
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise UserError(
            f"{where} has {len(values)} numbers after the class: a box has 4 (x y width height), a polygon 6 or more "
            "(x and y alternating)"
        )
    if not all(map(math.isfinite, values)):
        raise UserError(f"{where} has numbers that are not finite: correct it")
    width, height = size
    masks: dict[str, Any] = {}
    if len(values) == 4:
        x, y, w, h = values
        if w < 0 or h < 0:
            raise UserError(f"{where} has a box of negative width or height: correct it")
        corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    else:
        xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
        corners = [min(xs), min(ys), max(xs), max(ys)]
        masks["segmentation"] = [list(chain.from_iterable(zip(xs, ys, strict=True)))]
    box = validator(corners, width, height, where)
    return None if box is None else make_annotation(box, category_ids[number], **masks)
