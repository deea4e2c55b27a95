"""YOLO's text files as Ultralytics lays them out: a text file of labels beside or opposite each image.

A line is ``class x y width height`` with the box's centre and size, or ``class x y x y x y ...`` with the corners of a
polygon, all as shares of the image's width and height.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from detectron2.structures import BoxMode

from relvit_d2.data.cache import Labels, cached
from relvit_d2.data.decode import image_size
from relvit_d2.data.folder import list_images
from relvit_d2.data.places import refuse_links_out
from relvit_d2.data.records import BoxJudge, Record, check_unique, first_few, renumbered
from relvit_d2.data.splits import one_or_split, split_of
from relvit_d2.errors import UserError

NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt")  # a class a line
LOOKED_AT = 1000  # images whose labels are looked for to tell whether a folder has any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class YoloFolder:
    """A folder with a text file for each image: ``DATASETS.CUSTOM``'s and ``--data``'s.

    Attributes:
        root: the folder.
        sets: images of each split.
    """

    root: Path
    sets: dict[str, list[Path]]
    metrics = ("coco",)

    @classmethod
    def find(cls, root: Path) -> "YoloFolder | None":
        """Return what lies in ``root``, or None if no image there has labels.

        The folders above an image say of which split it is: ``images/train`` or ``train/images``. Paths in
        ``data.yaml`` are not followed.
        """
        try:
            images = list_images(root)
        except UserError:
            return None
        if not any(_label_file(image, root).is_file() for image in images[:LOOKED_AT]):
            return None
        sets: dict[str, list[Path]] = {}
        for image in images:
            parts = image.parent.relative_to(root).parts
            sets.setdefault(next(filter(None, map(split_of, reversed(parts))), ""), []).append(image)
        if len(sets) > 1 and (rest := sets.pop("", [])):
            logger.info(f"{len(rest)} images of '{root}' are in no folder of a split and left out: {first_few(rest)}")
        return cls(root, one_or_split(sets))

    def classes(self) -> tuple[str, ...]:
        """Return the names that ``data.yaml`` or ``classes.txt`` gives, else the numbers that objects have."""
        return tuple((_names(self.root) or self._numbers()).values())

    def records(self, split: str, classes: Sequence[str], skip_missing: bool) -> list[Record]:
        """Read one of ``sets``; an image without a file of labels has no objects, bad boxes as by ``BoxJudge``."""
        images = self.images(split, skip_missing)
        labels = [_label_file(image, self.root) for image in images]
        refuse_links_out(labels, self.root)
        if not any(label.is_file() for label in labels):
            raise UserError(
                f"not one image of the split '{split}' of '{self.root}' has a file of labels: put them there"
            )

        def read() -> Labels:
            names = _names(self.root) or self._numbers()
            if not _names(self.root) and list(names.values()) != list(classes):
                names = dict(enumerate(classes))
            places = {number: place for place, number in enumerate(names)}
            judge = BoxJudge(str(self.root))
            read_one = [
                _record(image, label, self.root, places, judge) for image, label in zip(images, labels, strict=True)
            ]
            return list(names.values()), read_one, judge.notes()

        sources = [*images, *labels, *_name_files(self.root)]
        names, records, _ = cached(f"YOLO labels, {split}, {' '.join(classes)}", self.root, sources, read)
        return renumbered(records, names, classes, str(self.root))

    def images(self, split: str, skip_missing: bool) -> list[Path]:
        """List the images of one of ``sets``; no label is read."""
        images = self.sets[split]
        check_unique([image.relative_to(self.root).with_suffix("").as_posix() for image in images], f"'{self.root}'")
        refuse_links_out(images, self.root)
        return images

    def _numbers(self) -> dict[int, str]:
        files = [_label_file(image, self.root) for image in chain.from_iterable(self.sets.values())]
        refuse_links_out(files, self.root)
        numbers = {_class(words, where) for file in files for words, where in _lines(file)}
        return {number: str(number) for number in sorted(numbers)}


def _label_file(image: Path, root: Path) -> Path:
    """Return where the labels of an image are: in ``labels`` in place of ``images``, or else beside it."""
    parts = list(image.relative_to(root).with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        place = len(parts) - 2 - parts[-2::-1].index("images")
        opposite = root.joinpath(*parts[:place], "labels", *parts[place + 1 :])
        if opposite.is_file():
            return opposite
    return image.with_suffix(".txt")


def _name_files(root: Path) -> list[Path]:
    return [*sorted(root.glob("*.yaml")), *sorted(root.glob("*.yml")), *(root / name for name in NAME_FILES)]


def _names(root: Path) -> dict[int, str]:
    """Return the names of the classes by their numbers, in ascending order; {} if no file tells them."""
    for path in _name_files(root):
        if not path.is_file():
            continue
        refuse_links_out([path], root)
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix in (".yaml", ".yml"):
                content = yaml.safe_load(text)
                given = content.get("names") if isinstance(content, dict) else None
            else:
                given = [line.strip() for line in text.splitlines() if line.strip()]
        except (OSError, ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError) as error:
            raise UserError(
                f"the names of classes in {path} cannot be read ({' '.join(str(error).split())}): correct it"
            ) from error
        if not given:
            continue
        names = given if isinstance(given, dict) else dict(enumerate(given)) if isinstance(given, list) else {}
        if not names or not all(type(k) is int and k >= 0 and isinstance(v, int | str) for k, v in names.items()):
            raise UserError(f"{path} has names that are no list of classes and no numbers with a name each: correct it")
        if odd := [name for name in names.values() if not str(name).isprintable() or not str(name).strip()]:
            raise UserError(f"{path} has a class {odd[0]!r}, which cannot be printed: correct it")
        check_unique([str(name) for name in names.values()], str(path))
        return {number: str(names[number]) for number in sorted(names)}
    return {}


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
    if not (words[0].isascii() and words[0].isdecimal() and len(words[0]) < 10):
        raise UserError(f"{where} begins with {words[0][:20]!r}: it must begin with the number of a class")
    return int(words[0])


def _record(image: Path, label: Path, root: Path, places: dict[int, int], judge: BoxJudge) -> Record:
    width, height = image_size(image)
    things = [_thing(words, where, (width, height), places, judge) for words, where in _lines(label)]
    return {
        "file_name": str(image),
        "image_id": image.relative_to(root).with_suffix("").as_posix(),
        "height": height,
        "width": width,
        "annotations": [thing for thing in things if thing],
    }


def _thing(
    words: list[str], where: str, size: tuple[int, int], places: dict[int, int], judge: BoxJudge
) -> Record | None:
    number = _class(words, where)
    if number not in places:
        raise UserError(f"{where} is of the class {number}, but the names of classes tell {_some(places)}: name it too")
    try:
        values = [float(word) for word in words[1:]]
    except ValueError as error:
        raise UserError(f"{where} has a word that is no number: correct it") from error
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
    box = judge(corners, width, height, where)
    return None if box is None else thing | {"bbox": box}


def _some(places: dict[int, int]) -> str:
    numbers = list(places)
    return ", ".join(map(str, numbers)) if len(numbers) < 9 else f"{numbers[0]} to {numbers[-1]}"
