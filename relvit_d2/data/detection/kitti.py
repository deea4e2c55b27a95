"""KITTI's object detection data set: ``image_2/*.png`` and ``label_2/*.txt``, and its two train/val splits.

A line of a label file has 15 columns: type, truncated (0 to 1), occluded (0 visible, 1 partly, 2 largely, 3 unknown),
alpha, left, top, right, bottom (pixels counted from 0), and seven 3D values (readme.txt of the official development
kit). ``DontCare`` marks a region whose objects were not labelled.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from relvit_d2.data.detection.records import (
    Record,
    checked_box,
    checked_name,
    clip_box,
    make_annotation,
    make_record,
)
from relvit_d2.data.images.decode import image_size
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.paths import DataRoot

TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")
"""All object types beside ``DontCare``."""

CLASS_SETS = {3: ("Car", "Pedestrian", "Cyclist"), 7: TYPES[:-1], 8: TYPES}
"""The evaluated classes; all types but ``Misc``; all types."""

NEIGHBOURS = {"Van": "Car", "Person_sitting": "Pedestrian"}
"""A type that resembles an evaluated class, and that class (evaluate_object.cpp, cleanData)."""

OFFICIAL = tuple(f"{number:06d}" for number in range(7481))
"""The ids of the official images."""

SEED = 0
COLUMNS = 15

logger = logging.getLogger(__name__)


def load_kitti(folder: Path, ids: Sequence[str], class_names: Sequence[str]) -> list[Record]:
    """Read labelled images.

    Ignored regions become crowds (``"iscrowd": 1``), clipped to the image: ``DontCare``, and ``Misc`` where it is not a
    class, of every class; ``Van`` and ``Person_sitting``, where they are not classes, of the class that they resemble.
    Other types that are not classes are left out.

    Args:
        folder: contains ``image_2`` and ``label_2``.
        ids: names of the images without extension.
        class_names: a subset of ``TYPES``, in the order of the category ids.

    Returns:
        One record per image (see ``relvit_d2.data.detection.records``); ``image_id`` is the id. Each annotation has
        ``"type"`` (str), ``"truncated"`` (0..1), ``"occluded"`` (0..3; both -1 for ``DontCare``), and ``"resembles"``,
        the evaluated class that it resembles, or None.

    Raises:
        UserError: a file is missing or damaged, a type is unknown or the box of an object is invalid.
    """
    root = DataRoot()
    labels = [folder / "label_2" / f"{image_id}.txt" for image_id in ids]
    pairs = zip(kitti_images(folder, ids), labels, strict=True)
    return [_read_record(image, label, root.read_text(label, "ascii"), class_names) for image, label in pairs]


def kitti_ids(folder: Path) -> tuple[str, ...]:
    """Return the names of the images in ``folder/image_2`` without extension, sorted.

    Raises:
        UserError: there is none, or one has a name that cannot be printed.
    """
    images = folder / "image_2"
    ids = tuple(sorted(checked_name(path.stem, str(images)) for path in images.glob("*.png")))
    if not ids:
        raise UserError(f"{images} does not exist or contains no PNG: unpack data_object_image_2.zip there")
    return ids


def kitti_images(folder: Path, ids: Sequence[str]) -> list[Path]:
    """Return the images with these ids; no label is read.

    Raises:
        UserError: one is a link that leads out of the data set.
    """
    images = [folder / "image_2" / f"{image_id}.png" for image_id in ids]
    DataRoot().check_links(images)
    return images


@cache  # so that the warning is logged once
def random_split(ids: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the random split: three quarters for training and one quarter for validation.

    The last quarter of the shuffled ids (:func:`shuffled`), at least one, is ``val``. The ids are sorted.
    """
    if ids != OFFICIAL:
        logger.warning(
            f"{len(ids)} KITTI images were found instead of the official {len(OFFICIAL)}: the rule of the random split "
            "is applied to their ids, so the split differs from the published one"
        )
    order = shuffled(ids)
    cut = len(ids) - _quarter(len(ids))
    return {"train": sorted(order[:cut]), "val": sorted(order[cut:])}


def sequence_split(ids: Sequence[str], mapping: Path) -> dict[str, list[str]]:
    """Return a split in which all images of a drive are in the same part.

    The drives are shuffled (:func:`shuffled`); each goes to ``val`` if that then has at most a quarter of the images,
    otherwise to ``train``.

    Args:
        ids: of all images, sorted.
        mapping: the development kit's folder with ``train_rand.txt``, one line of numbers separated by commas. Its i-th
            number, counted from 0, is the line of image i in ``train_mapping.txt``, counted from 1; such a line is a
            date, a drive and a frame (readme.txt, "Mapping to Raw Data").

    Returns:
        Sorted ids under ``"train"`` and ``"val"``.

    Raises:
        UserError: the mapping is missing or damaged, lacks an image, or all images are of one drive.
    """
    drives = read_drives(mapping)
    try:
        drive_of = {image_id: drives[int(image_id)] for image_id in ids}
    except (ValueError, IndexError) as error:
        raise UserError(f"{mapping} has {len(drives)} images, not all those found ({error}): restore it") from error
    sizes = Counter(drive_of.values())
    if len(sizes) < 2:
        raise UserError(
            f"all KITTI images found are of the drive {next(iter(sizes))}: use the random split, kitti_train"
        )
    remaining = _quarter(len(ids))
    val: set[str] = set()
    for drive in shuffled(sorted(sizes)):
        if sizes[drive] <= remaining:
            val.add(drive)
            remaining -= sizes[drive]
    val = val or {min(sorted(sizes), key=sizes.__getitem__)}
    return {
        "train": [image_id for image_id in ids if drive_of[image_id] not in val],
        "val": [image_id for image_id in ids if drive_of[image_id] in val],
    }


def read_drives(mapping: Path) -> list[str]:
    """Return the drive of image 0, 1, ... (see :func:`sequence_split`), such as ``2011_09_28_drive_0106_sync``.

    Raises:
        UserError: a file is missing or damaged.
    """
    root, rand_file = DataRoot(), mapping / "train_rand.txt"
    lines = root.read_text(mapping / "train_mapping.txt", "ascii").splitlines()
    numbers = re.split(r"[\s,]+", root.read_text(rand_file, "ascii").strip(" \r\n,"))
    drives = []
    for number in numbers:
        whole = number.isdecimal() and len(number) < 10  # Python refuses to parse numbers of thousands of digits
        row = lines[int(number) - 1].split() if whole and 0 < int(number) <= len(lines) else []
        if len(row) != 3:
            raise UserError(
                f"{rand_file} has the entry {number[:20]!r}, which is not the number of a line of train_mapping.txt "
                "with a date, a drive and a frame: restore both from the development kit"
            )
        drives.append(row[1])
    return drives


def shuffled(names: Sequence[str]) -> list[str]:
    """Return the names in a pseudorandom order that is the same everywhere: by the SHA-256 of seed and name.

    The generators of NumPy and Python may draw other numbers in another version.
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{SEED} {name}".encode()).digest())


def _quarter(count: int) -> int:
    return max(1, round(count / 4))


def _read_record(image: Path, label: Path, text: str, class_names: Sequence[str]) -> Record:
    size = image_size(image)
    annotations: list[Record] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            annotations += _read_line(line.split(), *size, f"{label}, line {number}", class_names)
    return make_record(image, image.stem, size, annotations)


def _read_line(columns: list[str], width: int, height: int, where: str, class_names: Sequence[str]) -> list[Record]:
    """Return the annotations of a line: one for an object, one for each class that ignores a region."""
    if len(columns) != COLUMNS:
        raise UserError(f"{where} has {len(columns)} columns, not {COLUMNS}: restore it")
    kind = columns[0]
    if kind not in (*TYPES, "DontCare"):
        raise UserError(f"{where} is of the type '{kind}', which KITTI does not have{nearest(kind, TYPES)}: correct it")
    try:
        numbers = [float(text) for text in columns[1:8]]
    except ValueError as error:
        raise UserError(f"{where} has a column that is not a number ({error}): correct it") from error
    truncated, occluded, _, *corners = numbers
    if not all(map(math.isfinite, numbers)) or not occluded.is_integer():
        raise UserError(f"{where} has a column that is not finite, or a fractional occlusion level: correct it")
    if kind in class_names:
        names, box = [kind], checked_box(corners, width, height, f"{where} ({kind})")
    elif (region := clip_box(corners, width, height)) is None:
        return []
    else:
        ignores_all = kind in ("DontCare", "Misc")
        names, box = [name for name in class_names if ignores_all or NEIGHBOURS.get(kind) == name], region
    values = {"type": kind, "truncated": truncated, "occluded": int(occluded), "resembles": NEIGHBOURS.get(kind)}
    return [make_annotation(box, class_names.index(name), int(name != kind), **values) for name in names]
