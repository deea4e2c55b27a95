"""Labels of other annotation programs: converted to annotations as in COCO's files, and validated as those are.

The converters, in ``label_programs.py`` and ``huggingface.py``, yield a :class:`LabelledImage` for each image. Each
image is searched for below the root of the data set by the end of its path, since exports name images by their path on
another computer or on a server.
"""

import csv
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from relvit_d2.data.detection.coco import read_annotation
from relvit_d2.data.detection.records import (
    BoxValidator,
    Record,
    first_few,
    make_record,
    parse_integer,
    renumber_classes,
)
from relvit_d2.data.detection.splits import ALL, merge_single_split, split_of, splits_of_folders, warn_once
from relvit_d2.data.images.decode import size_if_readable
from relvit_d2.data.images.folder import list_images
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import DataRoot, normal_form

# Exceptions in the conversion of a damaged file.
DAMAGE = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError, TypeError, ValueError),
    *(ParseError, csv.Error),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledImage:
    """An image in a label file.

    Attributes:
        source: the label file.
        names: paths that the image may have, as in the file, the most likely first.
        size: width and height in pixels; None: those of the image file.
        objects: COCO annotations with the name of the class as ``category_id``, and the position in the file for
            messages as ``where``.
        split: the name of its split, if the file contains one.
        path: the image, if it is not to be searched for.
    """

    source: Path
    names: Sequence[str]
    size: tuple[Any, Any] | None
    objects: list[dict[str, Any]]
    split: str = ""
    path: Path | None = None


@dataclass(frozen=True)
class LabelFormat:
    """A format that is converted.

    Attributes:
        title: name in messages.
        candidates: returns files below a folder that may be label files.
        matches: whether a candidate is a label file.
        read: yields the images of a label file.
        classes: returns the names of the classes in the order of their indices, if a label file lists them.
        per_image: whether each image has a label file, so that names of label files are no splits.
    """

    title: str
    candidates: Callable[[Path], Iterable[Path]]
    matches: Callable[[Path], object]
    read: Callable[[Path], Iterable[LabelledImage]]
    classes: Callable[[Path], tuple[str, ...]] = lambda _: ()
    per_image: bool = False

    def open(self, root: Path) -> "ConvertedFolder | None":
        """Return the data set in ``root``, or None if it contains no label file of the format.

        Splits are those in the label files, or else in the names of the label files and their folders, or else in the
        names of the images' folders.

        Raises:
            UserError: a label file is damaged, or two label the same image.
        """
        candidates = [path for path in self.candidates(root) if path.is_file()]
        DataRoot(root).check_links(candidates)
        files = list(filter(self.matches, candidates))
        if not files:
            return None
        entries = [entry for file in files for entry in _read_file(self, file, _state(file))]
        if self.per_image and len(files) < len(candidates):
            others = first_few([path for path in candidates if path not in set(files)])
            warn_once(f"{len(candidates) - len(files)} files of '{root}' are not in {self.title}'s format: {others}")
        if not entries:
            raise UserError(f"{first_few(files)} in {self.title}'s format has no labelled image: label some")
        paths = _image_paths(root, entries)
        sets: dict[str, list[tuple[LabelledImage, Path | None]]] = {}
        for split, pair in zip(self._splits(root, entries, paths), zip(entries, paths, strict=True), strict=True):
            sets.setdefault(split or ALL, []).append(pair)
        classes = dict.fromkeys(name for file in files for name in self.classes(file))
        return ConvertedFolder(root, merge_single_split(sets), tuple(classes))

    def _splits(
        self, root: Path, entries: Sequence[LabelledImage], paths: Sequence[Path | None]
    ) -> Sequence[str | None]:
        files = [entry.source.relative_to(root) for entry in entries]
        images = [path.parent for path in paths if path]
        common = Path(os.path.commonpath(images)) if images else root
        candidates: tuple[Sequence[str | None], ...] = (
            [split_of(entry.split) for entry in entries],
            splits_of_folders([(*file.parent.parts, *(() if self.per_image else (file.stem,))) for file in files]),
            splits_of_folders([path.parent.relative_to(common).parts if path else () for path in paths]),
        )
        return next((splits for splits in candidates if any(splits)), candidates[-1])


@dataclass(frozen=True)
class ConvertedFolder:
    """A custom data set whose labels are converted (``DATASETS.CUSTOM``, ``--data``).

    Attributes:
        root: the folder.
        sets: the labelled images of each split, and where they are; None: missing.
        given: class names in the order of their indices, if the label files list them.
    """

    root: Path
    sets: dict[str, list[tuple[LabelledImage, Path | None]]]
    given: tuple[str, ...] = ()
    metrics: tuple[str, ...] = field(default=("coco",), init=False)

    def classes(self) -> tuple[str, ...]:
        """Return the classes that the label files list, or else those of all objects: numbers, then text, sorted."""
        names = {_class_name(entry) for pairs in self.sets.values() for image, _ in pairs for entry in image.objects}
        if names <= set(self.given):
            return self.given

        def order(name: str) -> tuple[float, str]:
            number = parse_integer(name)
            return (float("inf") if number is None else number), name

        return tuple(sorted(names, key=order))

    def records(self, split: str, classes: Sequence[str], skip_missing: bool) -> list[Record]:
        """Read one of ``sets``; ``BoxValidator`` handles invalid boxes."""
        self.images(split, skip_missing)
        names = self.classes()
        numbers = {index: index for index in range(len(names))}
        indices = {name: index for index, name in enumerate(names)}
        validator = BoxValidator(str(self.root))
        records = []
        present = [(image, path, self._name(path)) for image, path in self.sets[split] if path]
        same = Counter(name.with_suffix("") for _, _, name in present)
        for image, path, name in present:
            image_id = name if same[name.with_suffix("")] > 1 else name.with_suffix("")  # a.png beside a.jpg
            record = make_record(path, image_id.as_posix(), _size(image, path), [])
            for entry in image.objects if record["width"] else ():  # 0: an unreadable image
                annotation = entry | {"category_id": indices[_class_name(entry)]}
                if valid := read_annotation(annotation, record, numbers, validator, entry["where"]):
                    record["annotations"].append(valid)
            records.append(record)
        for warning in validator.warnings():
            logger.warning(warning)
        return renumber_classes(records, names, classes, str(self.root))

    def _name(self, path: Path) -> Path:
        return path.relative_to(self.root) if path.is_relative_to(self.root) else Path(*path.parts[-2:])

    def images(self, split: str, skip_missing: bool) -> list[Path]:
        """List the images of one of ``sets``."""
        absent = [image for image, path in self.sets[split] if path is None]
        if absent and (not skip_missing or len(absent) == len(self.sets[split])):
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            skip = "" if skip_missing else ", or set DATASETS.SKIP_MISSING True to leave out missing images"
            raise UserError(
                f"the image '{absent[0].names[0]}'{more} of {absent[0].source} is not below '{self.root}': put it "
                f"there{skip}"
            )
        if absent:
            names = first_few([image.names[0] for image in absent])
            logger.warning(f"{len(absent)} images of '{self.root}' are missing and left out: {names}")
        return [path for _, path in self.sets[split] if path]


def _state(file: Path) -> tuple[int, ...]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


@lru_cache(maxsize=100_000)
def _read_file(form: LabelFormat, file: Path, _: tuple[int, ...]) -> tuple[LabelledImage, ...]:
    """Return the images of a label file; a run opens its data set several times, and the files may be large."""
    try:
        return tuple(form.read(file))
    except DAMAGE as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(f"{file} is damaged or not in {form.title}'s format ({reason}): export it again") from error


def _image_paths(root: Path, entries: Sequence[LabelledImage]) -> list[Path | None]:
    """Return the image of each entry, None where it is missing."""
    by_name: dict[str, list[Path]] = {}
    if any(entry.path is None for entry in entries):
        for image in list_images(root):
            for name in {normal_form(image.name), normal_form(image.stem)}:
                by_name.setdefault(name, []).append(image)
    paths = [entry.path or _find_image(entry, by_name) for entry in entries]
    sources: dict[Path, Path] = {}
    for path, entry in zip(paths, entries, strict=True):
        if path in sources:
            raise UserError(f"the image '{path}' is labelled twice, in {sources[path]} and {entry.source}: remove one")
        if path:
            sources[path] = entry.source
    DataRoot(root).check_links(path for path, entry in zip(paths, entries, strict=True) if path and not entry.path)
    return paths


def _find_image(entry: LabelledImage, by_name: dict[str, list[Path]]) -> Path | None:
    """Return the image whose path has the longest end in common with the name, of several the nearest to the labels."""
    if not entry.names:
        raise UserError(f"{entry.source} has an entry that names no image: correct or remove it")
    for name in entry.names:
        parts = [part for part in normal_form(str(name)).replace("\\", "/").split("/") if part not in ("", ".", "..")]
        candidates = by_name.get(parts[-1], []) if parts else []
        if not candidates:
            continue

        def rank(path: Path, parts: Sequence[str] = parts[:-1]) -> tuple[int, int, bool]:
            folders = list(map(normal_form, path.parent.parts))
            same = [a == b for a, b in zip(reversed(parts), reversed(folders), strict=False)]
            near = len(os.path.commonpath([path, entry.source])), path.parent == entry.source.parent
            return (*same, False).index(False), *near

        ranks = {path: rank(path) for path in candidates}
        best = [path for path in candidates if ranks[path] == max(ranks.values())]
        if len(best) > 1:
            raise UserError(f"'{best[0]}' and '{best[1]}' may both be the image '{name}' of {entry.source}: remove one")
        return best[0]
    return None


def _class_name(entry: dict[str, Any]) -> str:
    name = entry["category_id"]
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise UserError(f"{entry['where']} has the class {str(name)[:40]!r}: set it to a printable name")
    return name.strip()


def _size(image: LabelledImage, path: Path) -> tuple[int, int]:
    sides = [parse_integer(side) for side in image.size or ()]
    width, height = sides if len(sides) == 2 else (None, None)
    if width is not None and height is not None and 1 <= width < 2**31 and 1 <= height < 2**31:
        return width, height
    return size_if_readable(path)
