"""YOLO's text files as Ultralytics lays them out: a text file of labels beside or opposite each image.

A line is ``class x y width height`` with the box's centre and size, or ``class x y x y x y ...`` with the corners of a
polygon, all relative to the image's width and height. Where ``data.yaml`` has ``kpt_shape``, key points follow the box.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from detectron2.structures import BoxMode

from relvit_d2.data.detection.data_yaml import Description, describe
from relvit_d2.data.detection.records import (
    BoxValidator,
    Record,
    check_printable,
    check_unique,
    existing,
    first_few,
    parse_whole_number,
    renumbered,
)
from relvit_d2.data.detection.splits import ALL, one_or_split, splits_of_folders
from relvit_d2.data.images.decode import image_size
from relvit_d2.data.images.folder import EXTENSIONS, files_below
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import normal_form, refuse_links_out

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class YoloFolder:
    """A folder with a text file for each image: ``DATASETS.CUSTOM``'s and ``--data``'s.

    Attributes:
        root: the folder.
        sets: images of each split.
        description: what ``data.yaml`` and the like give.
        label_files: the text files of the folder, by :func:`_key`.
    """

    root: Path
    sets: dict[str, list[Path]]
    description: Description
    label_files: dict[str, Path]
    metrics = ("coco",)

    @classmethod
    def find(cls, root: Path) -> "YoloFolder | None":
        """Return what lies in ``root``, or None if no image there has labels.

        ``data.yaml`` gives the images of each split, or else the names of the folders do: ``images/train`` or
        ``train/images``.

        Raises:
            UserError: the description is invalid, or an image has a name that cannot be printed.
        """
        files = sorted(map(Path, files_below(str(root), [])))
        images = [path for path in files if path.suffix.lower() in EXTENSIONS]
        texts = [path for path in files if path.suffix.lower() == ".txt"]
        label_files: dict[str, Path] = {}
        for path in sorted(texts, key=lambda path: path.suffix == ".txt"):  # the usual spelling comes last and counts
            label_files[_key(path, root)] = path
        found = cls(root, {}, Description(), label_files)
        labels = set(label_files.values())
        if not any(found.label_file(image) in labels for image in images):
            return None
        check_printable(images)
        description = describe(root, files)
        sets = description.sets
        if not sets:
            sets = {}
            folders = splits_of_folders([image.parent.relative_to(root).parts for image in images])
            for image, split in zip(images, folders, strict=True):
                sets.setdefault(split or "", []).append(image)
            if len(sets) > 1 and (rest := sets.pop("", [])):
                logger.info(
                    f"{len(rest)} images of '{root}' are in no folder of a split and left out: {first_few(rest)}"
                )
        elif rest := sorted(set(images) - set(chain.from_iterable(sets.values()))):
            logger.info(f"{len(rest)} images of '{root}' are in no split of the description: {first_few(rest)}")
        if len(sets) > 1 and not any(found.label_file(image) in labels for image in sets.get("test", images)):
            logger.warning(f"the {len(sets.pop('test'))} test images of '{root}' have no labels and are left out")
        first = next(iter(sets.values()))
        if all(set(part) == set(first) for part in sets.values()):  # train and val are one folder: it is not divided
            return cls(root, {ALL: first}, description, label_files)
        return cls(root, one_or_split(sets), description, label_files)

    def classes(self) -> tuple[str, ...]:
        """Return the names that ``data.yaml`` or ``classes.txt`` gives, else the numbers that objects have."""
        if not self.description.names:
            _warn_of_numbers(self.root)
        return tuple((self.description.names or self._numbers()).values())

    def records(self, split: str, classes: Sequence[str], skip_missing: bool) -> list[Record]:
        """Read one of ``sets``; an image without labels has no objects, and ``BoxValidator`` handles invalid boxes."""
        images = self.images(split, skip_missing)
        labels = [self.label_file(image) for image in images]
        refuse_links_out(labels, self.root)
        if not any(label.is_file() for label in labels):
            raise UserError(
                f"not one image of the split '{split}' of '{self.root}' has a file of labels: put them there"
            )
        keypoints = self.description.keypoints
        names = self.description.names or self._numbers()
        if not self.description.names and list(names.values()) != list(classes):
            names = dict(enumerate(classes))
        places = {number: place for place, number in enumerate(names)}
        validator = BoxValidator(str(self.root))
        records = [
            _record(image, label, self.root, places, keypoints, validator)
            for image, label in zip(images, labels, strict=True)
        ]
        for note in validator.notes():
            logger.warning(note)
        if keypoints:
            logger.warning(f"key points of '{self.root}' are not used, only the boxes")
        return renumbered(records, list(names.values()), classes, str(self.root))

    def images(self, split: str, skip_missing: bool) -> list[Path]:
        """List the images of one of ``sets``; no label is read."""
        images = existing(self.sets[split], f"the split '{split}' of '{self.root}'", skip_missing, self.root)
        check_unique([image.relative_to(self.root).with_suffix("").as_posix() for image in images], f"'{self.root}'")
        return images

    def label_file(self, image: Path) -> Path:
        """Return where the labels of an image are: in ``labels`` in place of ``images``, or else beside it."""
        key = _key(image, self.root)
        parts = key.split("/")
        if "images" in parts[:-1]:
            place = len(parts) - 2 - parts[-2::-1].index("images")
            if opposite := self.label_files.get("/".join([*parts[:place], "labels", *parts[place + 1 :]])):
                return opposite
        return self.label_files.get(key, image.with_suffix(".txt"))

    def _numbers(self) -> dict[int, str]:
        files = [self.label_file(image) for image in chain.from_iterable(self.sets.values())]
        refuse_links_out(files, self.root)
        numbers = {_class(words, where) for file in files for words, where in _lines(file)}
        return {number: str(number) for number in sorted(numbers)}


@cache  # once a run
def _warn_of_numbers(root: Path) -> None:
    logger.warning(f"no data.yaml or classes.txt in '{root}' names the classes: their numbers serve as names")


def _key(path: Path, root: Path) -> str:
    """Return a file's path below ``root`` without extension, in one normal form, ``images`` and ``labels`` in small."""
    *folders, name = normal_form(path.relative_to(root).with_suffix("").as_posix()).split("/")
    return "/".join([*(x.lower() if x.lower() in ("images", "labels") else x for x in folders), name])


def _lines(path: Path) -> list[tuple[list[str], str]]:
    """Return the words of each line that has any, and its place for messages; [] if there is no file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the labels {path} cannot be read ({type(error).__name__}): restore them") from error
    return [(line.split(), f"{path}, line {place}") for place, line in enumerate(lines, start=1) if line.strip()]


def _class(words: list[str], where: str) -> int:
    number = parse_whole_number(words[0])
    if number is None or number < 0:
        raise UserError(f"{where} begins with {words[0][:20]!r}: it must begin with the number of a class")
    return number


def _record(
    image: Path, label: Path, root: Path, places: dict[int, int], keypoints: int, validator: BoxValidator
) -> Record:
    width, height = image_size(image)
    things = [_thing(words, where, (width, height), places, keypoints, validator) for words, where in _lines(label)]
    return {
        "file_name": str(image),
        "image_id": image.relative_to(root).with_suffix("").as_posix(),
        "height": height,
        "width": width,
        "annotations": [thing for thing in things if thing],
    }


def _thing(
    words: list[str], where: str, size: tuple[int, int], places: dict[int, int], keypoints: int, validator: BoxValidator
) -> Record | None:
    number = _class(words, where)
    if number not in places:
        raise UserError(
            f"{where} is of the class {number}, but the names of classes are for {_some(places)}: name it too"
        )
    try:
        values = [float(word) for word in words[1:]]
    except ValueError as error:
        raise UserError(f"{where} has a word that is no number: correct it") from error
    if keypoints and len(values) not in (4, 4 + keypoints):
        raise UserError(
            f"{where} has {len(values)} numbers behind the class: with the kpt_shape of data.yaml a box has 4 and its "
            f"key points {keypoints}"
        )
    values = values[:4] if keypoints else values
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise UserError(
            f"{where} has {len(values)} numbers behind the class: a box has 4 (x y width height), a polygon 6 or more, "
            "x and y in turn"
        )
    if not all(map(math.isfinite, values)):
        raise UserError(f"{where} has numbers that are not finite: correct it")
    width, height = size
    thing: Record = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": places[number], "iscrowd": 0}
    if len(values) == 4:
        x, y, w, h = values
        if w < 0 or h < 0:
            raise UserError(f"{where} has a box of negative width or height: correct it")
        corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    else:
        xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
        corners = [min(xs), min(ys), max(xs), max(ys)]
        thing["segmentation"] = [list(chain.from_iterable(zip(xs, ys, strict=True)))]
    box = validator(corners, width, height, where)
    return None if box is None else thing | {"bbox": box}


def _some(places: dict[int, int]) -> str:
    numbers = list(places)
    return ", ".join(map(str, numbers)) if len(numbers) < 9 else f"{numbers[0]} to {numbers[-1]}"
