"""What every reader shares: the record, and the checks a file has to pass before it becomes one.

A record is Detectron2's standard data set dict: ``file_name`` (str), ``image_id`` (str or int), ``height`` and
``width`` (int, pixels), ``annotations``: a list of ``{"bbox", "bbox_mode": BoxMode.XYXY_ABS, "category_id",
"iscrowd": 0}``, for VOC with ``"difficult": 0 | 1`` too. Boxes are ``[x0, y0, x1, y1]`` floats in continuous
pixel coordinates: the image spans ``[0, width] x [0, height]``.
"""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from relvit_d2.data.places import refuse_stray
from relvit_d2.errors import UserError

Record = dict[str, Any]

logger = logging.getLogger(__name__)

BORDER_SLACK = 1.0
"""Pixels a box may stick out of its image before it counts as wrong; such a box is clipped.

One pixel is the difference between counting from 0 and from 1, and more than any rounding of rescaled boxes.
"""


def checked_box(corners: Sequence[float], width: int, height: int, where: str, first_pixel: int = 0) -> list[float]:
    """Return ``corners`` as a box inside the image.

    Args:
        corners: ``xmin, ymin, xmax, ymax`` as the file has them.
        width: of the image, pixels.
        height: of the image, pixels.
        where: the file and the object, for the error message.
        first_pixel: the number the file gives to the first pixel. With 1 (PASCAL VOC: inclusive, counted from
            one) only the minima are shifted, so that ``xmin=1, xmax=W`` covers the image (Detectron2,
            data/datasets/pascal_voc.py:63-69).

    Returns:
        ``[x0, y0, x1, y1]`` with ``0 <= x0 < x1 <= width`` and ``0 <= y0 < y1 <= height``.

    Raises:
        UserError: a corner is not finite, a minimum is not below its maximum, or the box leaves the image by more
            than ``BORDER_SLACK``.
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
    if outside_by > BORDER_SLACK or inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise UserError(
            f"{where} has a box outside its image of {width} x {height} pixels {given}: correct or remove it"
        )
    return inside


def checked_name(name: str, where: str) -> str:
    """Return ``name`` if it is a plain file name, so that no list can point out of its own folder.

    Raises:
        UserError: it is empty, ``.`` or ``..``, or holds a path separator or an unprintable character.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(f"{where} names {name!r}, which is not a plain file name: correct it")
    return name


def check_unique(names: Sequence[str], where: str) -> None:
    """Raise a ``UserError`` naming the first of ``names`` that comes twice: its detections would count twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{where} names '{name}' more than once: remove the second")
        seen.add(name)


def existing(images: Sequence[Path], where: str, skip_missing: bool) -> list[Path]:
    """Return those of ``images`` that exist, in their order.

    Args:
        images: what a data set lists.
        where: what lists them, for the messages.
        skip_missing: leave out the absent ones and name the first few in the log.

    Raises:
        UserError: an image is absent and ``skip_missing`` is not set, none exists, or one is a link to elsewhere (see
            :func:`relvit_d2.data.places.refuse_stray`).
    """
    # One listing a folder: asking for each of 100,000 files takes minutes on a network disk.
    folders: dict[Path, dict[str, bool]] = {}
    for folder in {image.parent for image in images}:
        folders[folder] = {}
        if folder.is_dir():
            with os.scandir(folder) as entries:
                folders[folder] = {entry.name: entry.is_symlink() for entry in entries}
    found = [image for image in images if image.name in folders[image.parent]]
    for image in found:
        if folders[image.parent][image.name]:
            refuse_stray(image)
    if len(found) == len(images):
        return found
    missing = [image for image in images if image.name not in folders[image.parent]]
    if not skip_missing or not found:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        mend = "" if skip_missing else ", or set DATASETS.SKIP_MISSING True to go on without"
        raise UserError(f"the image {missing[0]}{more} is missing but listed in {where}: restore it{mend}")
    names = ", ".join(image.name for image in missing[:5]) + (", ..." if len(missing) > 5 else "")
    logger.warning(f"{len(missing)} of the {len(images)} images listed in {where} are missing and left out: {names}")
    return found


def image_size(path: Path) -> tuple[int, int]:
    """Return ``(width, height)`` in pixels from the file's header; no pixel is decoded.

    Raises:
        UserError: the file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({type(error).__name__}): replace it") from error
