"""What every reader shares: the record, and the checks a file has to pass before it becomes one.

A record is Detectron2's standard data set dict: ``file_name`` (str), ``image_id`` (str or int), ``height`` and
``width`` (int, pixels), ``annotations``: a list of ``{"bbox", "bbox_mode": BoxMode.XYXY_ABS, "category_id",
"iscrowd": 0 | 1}``, for VOC with ``"difficult": 0 | 1`` too. A crowd is a region that is neither object nor background:
in training for all classes, in evaluation for its own. Boxes are ``[x0, y0, x1, y1]`` floats in continuous pixel
coordinates: the image spans ``[0, width] x [0, height]``.
"""

import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.paths import refuse_links_out

Record = dict[str, Any]

logger = logging.getLogger(__name__)

BORDER_SLACK = 1.0
"""Pixels a box may stick out of its image before it counts as wrong; such a box is clipped.

One pixel is the difference between counting from 0 and from 1, and more than any rounding of rescaled boxes.
"""


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
        corners: ``xmin, ymin, xmax, ymax`` as the file has them.
        width: of the image, pixels.
        height: of the image, pixels.
        where: the file and the object, for the error message.
        first_pixel: the number the file gives to the first pixel. With 1 (PASCAL VOC: inclusive, counted from
            one) only the minima are shifted, so that ``xmin=1, xmax=W`` covers the image (Detectron2,
            data/datasets/pascal_voc.py:63-69).
        slack: pixels that the box may stick out of its image; what sticks out is cut off.

    Returns:
        ``[x0, y0, x1, y1]`` with ``0 <= x0 < x1 <= width`` and ``0 <= y0 < y1 <= height``.

    Raises:
        UserError: a corner is not finite, a minimum is not below its maximum, or the box leaves the image by more
            than ``slack``.
    """
    xmin, ymin, xmax, ymax = corners
    given = f"(xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g})"
    if not all(math.isfinite(value) for value in corners):
        raise UserError(f"{where} has a box that is not made of finite numbers {given}: correct or remove it")
    if xmin >= xmax or ymin >= ymax:
        raise UserError(f"{where} has a box without area {given}: correct or remove it")
    x0, y0 = xmin - first_pixel, ymin - first_pixel
    inside = [max(x0, 0.0), max(y0, 0.0), min(xmax, float(width)), min(ymax, float(height))]
    outside_by = max(abs(edge - kept) for edge, kept in zip((x0, y0, xmax, ymax), inside, strict=True))
    if outside_by > slack or inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise UserError(
            f"{where} has a box outside its image of {width} x {height} pixels {given}: correct or remove it"
        )
    return inside


@dataclass
class BoxValidator:
    """Judges the boxes of a data set that a user brings along, and says in the end what it did to them.

    A box without area is left out and one that sticks out of its image is cut at the border, both counted and named;
    what can only be a mistake (see :func:`checked_box`), or sticks out by more than the image is large, stops the run.

    Attributes:
        where: the data set, for the messages.
    """

    where: str
    _judged: int = 0
    _empty: list[str] = field(default_factory=list)
    _cut: list[str] = field(default_factory=list)
    _maskless: list[str] = field(default_factory=list)

    def __call__(
        self, corners: Sequence[float], width: int, height: int, where: str, first_pixel: int = 0
    ) -> list[float] | None:
        """Return the box inside the image, or None for one without area; arguments as for :func:`checked_box`."""
        self._judged += 1
        xmin, ymin, xmax, ymax = corners
        if (xmin == xmax and ymin <= ymax) or (ymin == ymax and xmin <= xmax):
            self._empty.append(where)
            return None
        box = checked_box(corners, width, height, where, first_pixel, slack=max(width, height))
        shifted = [xmin - first_pixel, ymin - first_pixel, xmax, ymax]
        if max(abs(a - b) for a, b in zip(shifted, box, strict=True)) > BORDER_SLACK:
            self._cut.append(where)
        return box

    def without_mask(self, where: str) -> None:
        """Count an object whose box is kept although its mask has no area."""
        self._maskless.append(where)

    def notes(self) -> list[str]:
        """Return what was left out or changed, as sentences for the log.

        Raises:
            UserError: if more than half of the boxes stick out: they are those of images of another size.
        """
        if 2 * len(self._cut) > self._judged:
            raise UserError(
                f"{len(self._cut)} of the {self._judged} boxes of {self.where} stick out of their images, the first in "
                f"{self._cut[0]}: they belong to images of another size, or are in another format"
            )
        done = (
            (self._empty, "have no area and are left out"),
            (self._cut, "stick out and are cut at the border"),
            (self._maskless, "have a mask without area and are kept as boxes without a mask"),
        )
        return [
            f"{len(boxes)} of the {self._judged} boxes of {self.where} {what}: {first_few(boxes)}"
            for boxes, what in done
            if boxes
        ]


def parse_whole_number(value: Any) -> int | None:
    """Return the whole number that ``value`` writes in any decimal notation, or None if it writes none.

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

    What is empty or ``Unspecified`` (PASCAL's word in its annotation files) counts as 0.
    """
    text = str(value).strip().lower()
    if value is None or text in ("", "unspecified", "none", "null", "false", "no"):
        return 0
    if text in ("true", "yes"):
        return 1
    number = parse_whole_number(value)
    return number if number in (0, 1) else None


def first_few(names: Sequence[Any]) -> str:
    """Return the first five of ``names`` in words."""
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


def checked_path(name: Any, folder: Path, where: str) -> Path:
    """Return the path that a file of a data set names, below ``folder``; sub-folders are allowed.

    Raises:
        UserError: it is no text or leads elsewhere: an absolute path, one with ``..`` or unprintable characters.
    """
    text = name.replace("\\", "/") if isinstance(name, str) else ""
    parts = [part for part in text.split("/") if part != "."]
    if not (text and parts) or not text.isprintable() or ":" in parts[0] or {"", ".."} & set(parts):
        raise UserError(f"{where} names {name!r}, which is no path inside '{folder}': correct it")
    return folder.joinpath(*parts)


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
    """Return the files right in ``folder`` with an extension (small letters, with its dot) in any case, sorted.

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
    """Return ``name`` if it is a plain file name, so that no list can point out of its own folder.

    Raises:
        UserError: it is empty, ``.`` or ``..``, or holds a path separator or an unprintable character.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(f"{where} names {name!r}, which is not a plain file name: correct it")
    return name


def check_printable(paths: Iterable[str | Path]) -> None:
    """Raise a ``UserError`` for the first of ``paths`` that no log could hold."""
    for path in paths:
        if not str(path).isprintable():
            locale = "" if sys.getfilesystemencoding() == "utf-8" else ", or set the environment variable PYTHONUTF8=1"
            raise UserError(f"the name of the file {os.fsencode(path)!r} cannot be printed: rename it{locale}")


def check_unique(names: Sequence[str], where: str) -> None:
    """Raise a ``UserError`` naming the first of ``names`` that comes twice: its detections would count twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{where} names '{name}' more than once: remove the second")
        seen.add(name)


def existing(images: Sequence[Path], where: str, skip_missing: bool, root: Path | None = None) -> list[Path]:
    """Return those of ``images`` that exist, in their order.

    Args:
        images: what a data set lists.
        where: what lists them, for the messages.
        skip_missing: leave out the absent ones and name the first few in the log.
        root: see :func:`relvit_d2.utils.paths.refuse_links_out`.

    Raises:
        UserError: an image is absent and ``skip_missing`` is not set, none exists, or one is a link to elsewhere.
    """
    # One listing a folder: asking for each of 100,000 files takes minutes on a network disk.
    folders = {image.parent for image in images}
    names = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in folders}  # noqa: PTH208
    found = [image for image in images if image.name in names[image.parent]]
    refuse_links_out(found, root)
    if len(found) == len(images):
        return found
    missing = [image for image in images if image.name not in names[image.parent]]
    if not skip_missing or not found:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        mend = "" if skip_missing else ", or set DATASETS.SKIP_MISSING True to go on without"
        raise UserError(f"the image {missing[0]}{more} is missing but listed in {where}: restore it{mend}")
    absent = first_few([image.name for image in missing])
    logger.warning(f"{len(missing)} of the {len(images)} images listed in {where} are missing and left out: {absent}")
    return found


def renumbered(records: Sequence[Record], names: Sequence[str], classes: Sequence[str], where: str) -> list[Record]:
    """Return records whose category ids count in ``names``, with ids that count in ``classes``.

    Raises:
        UserError: an object is of a class that is not among ``classes``.
    """
    numbers = {name: number for number, name in enumerate(classes)}

    def renumber(thing: Record) -> Record:
        name = names[thing["category_id"]]
        if name not in numbers:
            raise UserError(
                f"'{where}' has objects of the class '{name}', which is not one of {', '.join(classes)}"
                f"{nearest(name, list(classes))}"
            )
        return thing | {"category_id": numbers[name]}

    return [record | {"annotations": [renumber(thing) for thing in record["annotations"]]} for record in records]
