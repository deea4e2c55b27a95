"""Records of labelled images, and the checks that every reader applies to a label file.

A record is Detectron2's standard data set dict: ``file_name`` (str), ``image_id`` (str or int), ``height`` and
``width`` (int, pixels), ``annotations``: a list of ``{"bbox", "bbox_mode": BoxMode.XYXY_ABS, "category_id",
"iscrowd": 0 | 1}``, for VOC with ``"difficult": 0 | 1`` too. A crowd is a region that is neither object nor background:
in training for all classes, in evaluation for its own class. Boxes are ``[x0, y0, x1, y1]`` floats in continuous pixel
coordinates: the image spans ``[0, width] x [0, height]``.

An image whose size is needed but cannot be read has height and width 0 and no annotation; see
:func:`relvit_d2.data.detection.catalog.readable_records`.
"""

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.paths import DataRoot, check_printable
from relvit_d2.utils.printing import first_few

Record = dict[str, Any]

logger = logging.getLogger(__name__)

BORDER_SLACK = 1.0
"""Pixels that a box may exceed its image by before it counts as an error; such a box is clipped.

One pixel is the difference between counting from 0 and from 1, and more than any rounding of rescaled boxes.
"""


def make_record(image: Path, image_id: str | int, size: tuple[int, int], annotations: list[Record]) -> Record:
    """Return the record of an image of ``size`` (width, height) in pixels."""
    width, height = size
    return {
        "file_name": str(image),
        "image_id": image_id,
        "height": height,
        "width": width,
        "annotations": annotations,
    }


def make_annotation(box: list[float], category_id: int, crowd: int = 0, **extra: Any) -> Record:
    """Return the annotation of an object with an XYXY box in pixels."""
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category_id, "iscrowd": crowd, **extra}


def clip_box(corners: Sequence[float], width: int, height: int) -> list[float] | None:
    """Return the part of an XYXY box inside an image of ``width`` x ``height`` pixels, or None if there is none."""
    x0, y0, x1, y1 = corners
    inside = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None


def checked_box(
    corners: Sequence[float],
    width: int,
    height: int,
    where: str,
    first_pixel: int = 0,
    slack: float = BORDER_SLACK,
) -> list[float]:
    """Return ``corners`` as a box inside the image.

    Args:
        corners: ``xmin, ymin, xmax, ymax`` as in the file.
        width: of the image, pixels.
        height: of the image, pixels.
        where: the file and the object, for the error message.
        first_pixel: index of the first pixel in the file. With 1 (PASCAL VOC: inclusive, counted from one) only the
            minima are shifted, so that ``xmin=1, xmax=W`` covers the image (Detectron2,
            data/datasets/pascal_voc.py:63-69).
        slack: pixels that the box may exceed the image by; it is clipped.

    Returns:
        ``[x0, y0, x1, y1]`` with ``0 <= x0 < x1 <= width`` and ``0 <= y0 < y1 <= height``.

    Raises:
        UserError: a corner is not finite, a minimum is not below its maximum, or the box exceeds the image by more
            than ``slack``.
    """
    xmin, ymin, xmax, ymax = corners
    given = f"(xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g})"
    if not all(math.isfinite(value) for value in corners):
        raise UserError(f"{where} has a box with coordinates that are not finite {given}: correct or remove it")
    if xmin >= xmax or ymin >= ymax:
        raise UserError(f"{where} has a box without area {given}: correct or remove it")
    shifted = xmin - first_pixel, ymin - first_pixel, xmax, ymax
    inside = clip_box(shifted, width, height)
    if inside is None or max(abs(a - b) for a, b in zip(shifted, inside, strict=True)) > slack:
        raise UserError(
            f"{where} has a box outside its image of {width} x {height} pixels {given}: correct or remove it"
        )
    return inside


@dataclass
class BoxValidator:
    """Validates the boxes of a custom data set and counts those that it drops or clips.

    A box without area is dropped and one that exceeds its image is clipped. A box that can only be an error (see
    :func:`checked_box`), or exceeds its image by more than the image's longer side, is an error.

    Attributes:
        where: the data set, for messages.
    """

    where: str
    _count: int = 0
    _furthest: float = 0.0
    _empty: list[str] = field(default_factory=list)
    _clipped: list[str] = field(default_factory=list)
    _without_mask: list[str] = field(default_factory=list)

    def __call__(
        self, corners: Sequence[float], width: int, height: int, where: str, first_pixel: int = 0
    ) -> list[float] | None:
        """Return the box inside the image, or None for one without area; arguments as for :func:`checked_box`."""
        self._count += 1
        xmin, ymin, xmax, ymax = corners
        if (xmin == xmax and ymin <= ymax) or (ymin == ymax and xmin <= xmax):
            self._empty.append(where)
            return None
        box = checked_box(corners, width, height, where, first_pixel, slack=max(width, height))
        self._furthest = max(self._furthest, xmax, ymax)
        shifted = [xmin - first_pixel, ymin - first_pixel, xmax, ymax]
        if max(abs(a - b) for a, b in zip(shifted, box, strict=True)) > BORDER_SLACK:
            self._clipped.append(where)
        return box

    def count_empty_mask(self, where: str) -> None:
        """Count an object whose box is kept although its mask has no area."""
        self._without_mask.append(where)

    def warnings(self) -> list[str]:
        """Return one warning for each kind of change.

        Raises:
            UserError: more than half of the boxes exceed their images, so they belong to images of another size, or all
                are inside the first pixel, so they are fractions of the sides.
        """
        if 0 < self._furthest <= 1:
            raise UserError(
                f"all boxes of {self.where} are inside the first pixel of their images, so they are fractions of the "
                "sides: multiply them by the width and height in pixels"
            )
        if 2 * len(self._clipped) > self._count:
            raise UserError(
                f"{len(self._clipped)} of the {self._count} boxes of {self.where} exceed their images, the first in "
                f"{self._clipped[0]}: they belong to images of another size, or are in another format"
            )
        changes = (
            (self._empty, "have no area and are left out"),
            (self._clipped, "exceed their images and are clipped"),
            (self._without_mask, "have a mask without area and are kept as boxes without a mask"),
        )
        return [
            f"{len(boxes)} of the {self._count} boxes of {self.where} {change}: {first_few(boxes)}"
            for boxes, change in changes
            if boxes
        ]


def parse_integer(value: Any) -> int | None:
    """Return the integer that ``value`` represents in any decimal notation, or None if it represents none.

    Programs write the same class as ``3``, ``3.0``, ``"3"`` or ``3.000000e+00``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value.strip(), re.ASCII | re.IGNORECASE):
            return None
        value = float(value)
    return int(value) if math.isfinite(value) and value.is_integer() and abs(value) < 2**53 else None


def parse_flag(value: Any) -> int | None:
    """Return 0 or 1 for a flag such as ``iscrowd`` or ``difficult``, or None if ``value`` is not a flag.

    An empty value and ``Unspecified`` (in PASCAL's annotation files) count as 0.
    """
    text = str(value).strip().lower()
    if value is None or text in ("", "unspecified", "none", "null", "false", "no"):
        return 0
    if text in ("true", "yes"):
        return 1
    number = parse_integer(value)
    return number if number in (0, 1) else None


def folders_below(root: Path, depth: int = 2) -> Iterator[Path]:
    """Yield ``root`` and the folders below it down to ``depth``, without hidden ones and links, in order of name."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        below = []
        for folder in level:
            with os.scandir(folder) as entries:
                names = [e.name for e in entries if e.name[0] != "." and e.is_dir(follow_symlinks=False)]
            below += [folder / name for name in sorted(names)]
        level = below


def files_with(folder: Path, extension: str) -> list[Path]:
    """Return the files directly in ``folder`` with an extension (such as ``.xml``, in any case), sorted.

    Hidden files are left out.

    Raises:
        UserError: one has a name that cannot be printed.
    """
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.name[0] != "." and e.name.lower().endswith(extension))
    files = [folder / name for name in names]
    check_printable(files)
    return files


def checked_name(name: str, where: str) -> str:
    """Return ``name`` if it is a plain file name.

    Raises:
        UserError: it is empty, ``.`` or ``..``, or contains a path separator or an unprintable character.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(f"{where} names {name!r}, which is not a plain file name: correct it")
    return name


def check_unique(names: Sequence[str], where: str) -> None:
    """Raise a ``UserError`` for the first of ``names`` that occurs twice: its detections would count twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{where} names '{name}' more than once: remove the second")
        seen.add(name)


def existing_images(images: Sequence[Path], where: str, skip_missing: bool, root: DataRoot) -> list[Path]:
    """Return those of ``images``, which the file ``where`` lists, that exist; with ``skip_missing`` warn of the others.

    Raises:
        UserError: an image is missing and ``skip_missing`` is not set, none exists, or one leads out of the data set.
    """
    # One listing a folder: a query for each of 100,000 files takes minutes on a network disk.
    split = [os.path.split(image) for image in images]
    folders = {folder for folder, _ in split}
    names = {folder: set(os.listdir(folder or ".")) if Path(folder).is_dir() else set() for folder in folders}  # noqa: PTH208
    exists = [name in names[folder] for folder, name in split]
    found = list(compress(images, exists))
    root.check_links(found)
    if len(found) == len(images):
        return found
    missing = [image for image, present in zip(images, exists, strict=True) if not present]
    if not skip_missing or not found:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        skip = "" if skip_missing else ", or set DATASETS.SKIP_MISSING True to leave out missing images"
        raise UserError(f"the image {missing[0]}{more} is missing but listed in {where}: restore it{skip}")
    absent = first_few([image.name for image in missing])
    logger.warning(f"{len(missing)} of the {len(images)} images listed in {where} are missing and left out: {absent}")
    return found


def renumber_classes(
    records: Sequence[Record], names: Sequence[str], classes: Sequence[str], where: str
) -> list[Record]:
    """Return records whose category ids are indices into ``names`` with indices into ``classes``.

    Raises:
        UserError: an object is of a class that is not in ``classes``.
    """
    indices = {name: index for index, name in enumerate(classes)}

    def renumber(annotation: Record) -> Record:
        name = names[annotation["category_id"]]
        if name not in indices:
            raise UserError(
                f"'{where}' has objects of the class '{name}', which is not one of {', '.join(classes)}: "
                f"correct the labels or CLASSES{nearest(name, list(classes))}"
            )
        return annotation | {"category_id": indices[name]}

    return [record | {"annotations": [renumber(a) for a in record["annotations"]]} for record in records]
