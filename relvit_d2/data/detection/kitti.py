"""KITTI's object detection set: ``image_2/*.png`` and ``label_2/*.txt``, and its two splits.

A label's line has 15 columns: type, truncated (0 to 1), occluded (0 visible, 1 partly, 2 largely, 3 unknown), alpha,
left, top, right, bottom (pixels counted from 0), and seven of three dimensions (readme.txt of the official
development kit). ``DontCare`` marks a region whose objects were not labelled.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from detectron2.structures import BoxMode

from relvit_d2.data.detection.records import Record, checked_box, checked_name
from relvit_d2.data.images.decode import image_size
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.paths import refuse_links_out

TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")
"""What is labelled, beside ``DontCare``."""

CLASS_SETS = {3: ("Car", "Pedestrian", "Cyclist"), 7: TYPES[:-1], 8: TYPES}
"""The classes that are evaluated; all but what is like nothing else; all."""

NEIGHBOURS = {"Van": "Car", "Person_sitting": "Pedestrian"}
"""A type that resembles an evaluated class, and that class (evaluate_object.cpp, cleanData)."""

SPLITS = ("train", "val")
SEED = 0
COLUMNS = 15

logger = logging.getLogger(__name__)


def load_kitti(folder: Path, ids: Sequence[str], class_names: Sequence[str]) -> list[Record]:
    """Read labelled images.

    Regions that are neither object nor background are crowds, ``"iscrowd": 1``: ``DontCare`` and ``Misc``, where it is
    no class, of every class; ``Van`` and ``Person_sitting``, where they are none, of the class they resemble. Of a
    region, only the part inside the image counts. Other types that are no class are left out.

    Args:
        folder: holds ``image_2`` and ``label_2``.
        ids: names of the images without their ending.
        class_names: some of ``TYPES``, in the order of the category ids.

    Returns:
        One record an image (see ``relvit_d2.data.detection.records``); ``image_id`` is the id. Each annotation says its
        ``"type"`` (str), ``"truncated"`` (0..1) and ``"occluded"`` (0..3; both -1 for ``DontCare``), and in
        ``"resembles"`` the evaluated class that it resembles, if any.

    Raises:
        UserError: a file is missing or damaged, a type is unknown or the box of an object wrong; the file is named.
    """
    images = kitti_images(folder, ids)
    labels = [folder / "label_2" / f"{image_id}.txt" for image_id in ids]
    refuse_links_out(labels)
    return [_read_record(*pair, class_names) for pair in zip(images, labels, strict=True)]


def kitti_ids(folder: Path) -> tuple[str, ...]:
    """Return the names of the images in ``folder/image_2`` without their ending, sorted.

    Raises:
        UserError: there is none, or one has a name that cannot be printed.
    """
    images = folder / "image_2"
    ids = tuple(sorted(checked_name(path.stem, str(images)) for path in images.glob("*.png")))
    if not ids:
        raise UserError(f"{images} does not exist or holds no PNG: unpack data_object_image_2.zip there")
    return ids


def kitti_images(folder: Path, ids: Sequence[str]) -> list[Path]:
    """Return the images with these ids; no label is read.

    Raises:
        UserError: one is a link that leads out of the data.
    """
    images = [folder / "image_2" / f"{image_id}.png" for image_id in ids]
    refuse_links_out(images)
    return images


@cache  # so that what it logs is told once
def random_split(ids: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the random split, three quarters to train on and one to test on.

    The lists of all 7,481 official ids come with the package. For other ids the rule that made those lists is
    applied anew: the last quarter of the shuffled ids (:func:`shuffled`), one at least, is ``val``.

    Args:
        ids: of all images, sorted.

    Returns:
        Sorted ids under ``"train"`` and ``"val"``.
    """
    lists = {
        split: resources.files(__package__).joinpath(f"kitti_{split}.txt").read_text(encoding="utf-8").split()
        for split in SPLITS
    }
    official = sorted(lists["train"] + lists["val"])
    if ids == tuple(official):
        return lists
    logger.warning(
        f"{len(ids)} KITTI images are here, not the official {len(official)}: the rule of the random split is applied "
        "to their ids, so the split is not the one that comes with the package"
    )
    order = shuffled(ids)
    cut = len(ids) - _quarter(len(ids))
    return {"train": sorted(order[:cut]), "val": sorted(order[cut:])}


def sequence_split(ids: Sequence[str], mapping: Path) -> dict[str, list[str]]:
    """Return a split in which no drive has images on both sides.

    The drives are shuffled (:func:`shuffled`); each goes to ``val`` as long as that holds a quarter of the images at
    most, and to ``train`` otherwise.

    Args:
        ids: of all images, sorted.
        mapping: the development kit's folder with ``train_rand.txt``, one line of numbers with commas between them, of
            which the i-th, counted from 0, is the line for image i in ``train_mapping.txt``, counted from 1; such a
            line is a date, a drive and a frame (readme.txt, "Mapping to Raw Data").

    Returns:
        Sorted ids under ``"train"`` and ``"val"``.

    Raises:
        UserError: the mapping is missing or damaged, lacks an image, or all images are of one drive.
    """
    drives = read_drives(mapping)
    try:
        drive_of = {image_id: drives[int(image_id)] for image_id in ids}
    except (ValueError, IndexError) as error:
        raise UserError(f"{mapping} has {len(drives)} images, not all that are here ({error}): restore it") from error
    sizes = Counter(drive_of.values())
    if len(sizes) < 2:
        raise UserError(
            f"all KITTI images here are of the drive {next(iter(sizes))}: use the random split, kitti_train"
        )
    room = _quarter(len(ids))
    held: set[str] = set()
    for drive in shuffled(sorted(sizes)):
        if sizes[drive] <= room:
            held.add(drive)
            room -= sizes[drive]
    held = held or {min(sorted(sizes), key=sizes.__getitem__)}
    return {
        "train": [image_id for image_id in ids if drive_of[image_id] not in held],
        "val": [image_id for image_id in ids if drive_of[image_id] in held],
    }


def read_drives(mapping: Path) -> list[str]:
    """Return the drive of image 0, 1, ... (see :func:`sequence_split`), such as ``2011_09_28_drive_0106_sync``.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = mapping / "train_mapping.txt", mapping / "train_rand.txt"
    refuse_links_out(files)
    lines = _read_text(files[0]).splitlines()
    numbers = re.split(r"[\s,]+", _read_text(files[1]).strip(" \r\n,"))
    drives = []
    for number in numbers:
        whole = number.isdecimal() and len(number) < 10  # Python refuses to read numbers of thousands of digits
        row = lines[int(number) - 1].split() if whole and 0 < int(number) <= len(lines) else []
        if len(row) != 3:
            raise UserError(
                f"{files[1]} has the entry {number[:20]!r}, which is no line of train_mapping.txt "
                "with a date, a drive and a frame: restore both from the development kit"
            )
        drives.append(row[1])
    return drives


def shuffled(names: Sequence[str]) -> list[str]:
    """Return the names in an order that looks random and is the same everywhere: by the SHA-256 of seed and name.

    Generators of NumPy and Python may change what they draw from one version to the next.
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{SEED} {name}".encode()).digest())


def _quarter(count: int) -> int:
    return max(1, round(count / 4))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({type(error).__name__})"
        raise UserError(f"{path} {reason}: restore it") from error


def _read_record(image: Path, label: Path, class_names: Sequence[str]) -> Record:
    width, height = image_size(image)
    annotations: list[Record] = []
    for number, line in enumerate(_read_text(label).splitlines(), start=1):
        if line.strip():
            annotations += _read_line(line.split(), width, height, f"{label}, line {number}", class_names)
    return {
        "file_name": str(image),
        "image_id": image.stem,
        "height": height,
        "width": width,
        "annotations": annotations,
    }


def _read_line(columns: list[str], width: int, height: int, where: str, class_names: Sequence[str]) -> list[Record]:
    """Return the annotations that a line stands for: one of an object, one for each class that ignores a region."""
    if len(columns) != COLUMNS:
        raise UserError(f"{where} has {len(columns)} columns, not {COLUMNS}: restore it")
    kind = columns[0]
    if kind not in (*TYPES, "DontCare"):
        raise UserError(f"{where} is of the type '{kind}', which KITTI does not have{nearest(kind, TYPES)}: correct it")
    try:
        numbers = [float(text) for text in columns[1:8]]
    except ValueError as error:
        raise UserError(f"{where} has a column that is no number ({error}): correct it") from error
    truncated, occluded, _, *corners = numbers
    if not all(map(math.isfinite, numbers)) or not occluded.is_integer():
        raise UserError(f"{where} has columns that are not finite, or part of an occlusion step: correct it")
    where = f"{where} ({kind})"
    box = checked_box(corners, width, height, where) if kind in class_names else _inside(corners, width, height)
    if box is None:
        return []
    if kind in class_names:
        names = [kind]
    elif kind in ("DontCare", "Misc"):
        names = list(class_names)
    else:
        names = [name for name in class_names if NEIGHBOURS.get(kind) == name]
    return [
        {
            "bbox": box,
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": class_names.index(name),
            "iscrowd": int(name != kind),
            "type": kind,
            "truncated": truncated,
            "occluded": int(occluded),
            "resembles": NEIGHBOURS.get(kind),
        }
        for name in names
    ]


def _inside(corners: Sequence[float], width: int, height: int) -> list[float] | None:
    """Return the part of a region inside its image, ``None`` if there is none."""
    x0, y0, x1, y1 = corners
    inside = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None
