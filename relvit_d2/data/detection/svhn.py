"""SVHN format 1: whole photographs and ``digitStruct.mat``, a MATLAB 7.3 file, which is HDF5.

``/digitStruct/name`` and ``/digitStruct/bbox`` are columns of references, one per image. A name is a column of UTF-16
codes. A bbox is a group of five columns, ``left top width height label``, with a row per digit; MATLAB stores the
number itself for one digit and references to numbers for several. Label 10 is the digit 0.
"""

import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5r, h5s, h5t
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from relvit_d2.data.cache import Labels, cached
from relvit_d2.data.detection.records import (
    Record,
    check_unique,
    checked_name,
    clip_box,
    existing_images,
    make_annotation,
    make_record,
)
from relvit_d2.data.images.decode import image_size
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import DataRoot

CLASS_NAMES = tuple("0123456789")
LABELS_FILE = "digitStruct.mat"
FIELDS = ("left", "top", "width", "height", "label")
LABELS = frozenset(range(1, 11))

LONGEST_COLUMN = 255
"""Limit of characters in a name and digits in an image: a damaged file must not allocate gigabytes of memory."""

MOST_IMAGES = 10_000_000
"""Limit of images in a file, for the same reason; SVHN's largest split has 202,353."""

ROWS_AT_ONCE = 256
PATIENCE = 60
"""Maximum time in seconds to read that many rows, which takes less than one from a local disk."""

Row = tuple[str, list[tuple[float, ...]]]

_FIELDS = tuple(field.encode() for field in FIELDS)
_REFERENCE = h5t.py_create(h5py.ref_dtype)


def load_svhn(folder: Path, skip_missing: bool = False) -> list[Record]:
    """Read one split, in the order of its ``digitStruct.mat``.

    ``left`` and ``top`` are distances from the image's edge in pixels. Some of SVHN's boxes exceed their images: they
    are clipped, and a box completely outside is left out and counted in the log.

    Args:
        folder: contains ``digitStruct.mat`` and the images that it names.
        skip_missing: see :func:`relvit_d2.data.detection.records.existing_images`.

    Returns:
        One record per image (see :mod:`relvit_d2.data.detection.records`): ``category_id`` is the digit 0..9,
        ``image_id`` the image's name without extension.

    Raises:
        UserError: the file is missing or damaged, or an image is missing or unreadable.
    """
    path = folder / LABELS_FILE
    try:
        images = [entry.name for entry in os.scandir(folder) if entry.name.endswith(".png")]
    except OSError as error:
        raise UserError(f"the label file {path} is missing: unpack the archive of SVHN's format 1 there") from error
    sources = [path, *(folder / name for name in sorted(images))]
    return cached(f"SVHN, {skip_missing=}", folder, sources, lambda: _read(folder, path, skip_missing))[1]


def _read(folder: Path, path: Path, skip_missing: bool) -> Labels:
    rows = _read_rows(path)
    check_unique([name for name, _ in rows], str(path))
    found = set(existing_images([folder / name for name, _ in rows], str(path), skip_missing, DataRoot()))
    present = [(folder / name, digits) for name, digits in rows if folder / name in found]
    records, dropped = [], 0
    for image, digits in present:
        size = image_size(image)
        boxes = [clip_box((left, top, left + width, top + height), *size) for left, top, width, height, _ in digits]
        pairs = zip(boxes, digits, strict=True)
        annotations = [make_annotation(box, int(digit[-1]) % 10) for box, digit in pairs if box]
        dropped += len(digits) - len(annotations)
        records.append(make_record(image, image.stem, size, annotations))
    notes = [f"{dropped} boxes of {path} lie outside their images and are left out"] if dropped else []
    return list(CLASS_NAMES), records, notes


def svhn_images(folder: Path) -> list[Path]:
    """Return the images of one split, ``2.png`` before ``10.png``; no label is read.

    Raises:
        UserError: the folder is missing or contains no PNG, or one is a link that leads out of the data set.
    """
    images = sorted(folder.glob("*.png"), key=lambda path: (len(path.stem), path.stem))
    if not images:
        raise UserError(f"the folder {folder} does not exist or contains no PNG: unpack the archive there")
    DataRoot().check_links(images)
    return images


def _read_rows(path: Path) -> list[Row]:
    """Return the name of each image and its digits, each a tuple of the floats ``FIELDS``.

    A process of its own reads the file: the HDF5 library loops or crashes on some damaged files.
    """
    if not path.is_file():
        raise UserError(f"the label file {path} is missing: unpack the archive of SVHN's format 1 there")
    DataRoot().check_links([path])
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(path, sender))
    process.start()
    sender.close()
    rows: list[Row] = []
    try:
        while receiver.poll(PATIENCE):
            part = receiver.recv()
            if isinstance(part, UserError):
                raise part
            if not part:
                return rows
            rows += part
        reason = f"no row was read in {PATIENCE} seconds"
    except EOFError:
        reason = "the HDF5 library crashed"
    finally:
        process.kill()
        process.join()
        receiver.close()
    raise UserError(_damaged(path, reason))


def _send_rows(path: Path, sender: Connection) -> None:
    """Send the rows in parts and an empty list at the end, or a :class:`UserError`."""
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    try:
        rows = _rows(path)
        while part := list(islice(rows, ROWS_AT_ONCE)):
            sender.send(part)
        sender.send([])
    except UserError as error:
        sender.send(error)
    # h5py raises various exceptions for a damaged file.
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, MemoryError) as error:
        sender.send(UserError(_damaged(path, error)))


def _damaged(path: Path, reason: object) -> str:
    return f"{path} is damaged or not an SVHN label file ({reason}): unpack the archive again"


def _rows(path: Path) -> Iterator[Row]:
    with h5py.File(path, "r") as file:
        struct = _member(file.id, b"digitStruct")
        names, boxes = (_references(_member(struct, column)) for column in (b"name", b"bbox"))
        for row, pair in enumerate(zip(names, boxes, strict=True), start=1):
            yield _read_row(file, *pair, f"{path}, row {row}")


def _read_row(file: h5py.File, name: h5py.Reference, bbox: h5py.Reference, where: str) -> Row:
    # The low-level interface of h5py, for speed: an image takes about thirty calls, and SVHN has up to 202,353 images.
    codes = _column(h5r.dereference(name, file.id), np.dtype(np.uint16), h5t.NATIVE_UINT16)
    text = checked_name(codes.tobytes().decode("utf-16"), where)
    group = h5r.dereference(bbox, file.id)
    columns = [_numbers(file, _member(group, field)) for field in _FIELDS]
    digits = list(zip(*columns, strict=True))
    for digit in digits:
        if digit[4] not in LABELS or not all(map(math.isfinite, digit)):
            raise UserError(
                f"{where} ({text}) has a digit with {dict(zip(FIELDS, digit, strict=True))}: "
                "correct it to a finite box and a label from 1 to 10"
            )
    return text, digits


def _numbers(file: h5py.File, column: h5d.DatasetID) -> list[float]:
    """Return the numbers of a field, which are stored directly or as references."""
    if column.get_type().get_class() != h5t.REFERENCE:
        return _column(column, np.dtype(np.float64), h5t.NATIVE_DOUBLE).tolist()
    references = _column(column, h5py.ref_dtype, _REFERENCE)
    # The read fails for a reference to anything but one number.
    value, one = np.empty(1), h5s.create_simple((1,))
    numbers = []
    for reference in references:
        _in_file(h5r.dereference(reference, file.id)).read(one, h5s.ALL, value, mtype=h5t.NATIVE_DOUBLE)
        numbers.append(value.item())
    return numbers


def _member(group: h5g.GroupID, name: bytes) -> Any:
    """Return the member of a group; links by path, which may lead to another file, are refused."""
    if group.links.get_info(name).type != h5l.TYPE_HARD:
        raise ValueError(f"'{name.decode()}' is a link")
    return h5o.open(group, name)


def _in_file(dataset: h5d.DatasetID) -> h5d.DatasetID:
    """Return ``dataset`` if its numbers are stored in its own file, not in another one."""
    storage = dataset.get_create_plist()
    if storage.get_layout() == h5d.VIRTUAL or storage.get_external_count():
        raise ValueError("a column that is stored in another file")
    return dataset


def _references(dataset: h5d.DatasetID) -> np.ndarray:
    if math.prod(dataset.shape) > MOST_IMAGES:
        raise ValueError(f"{math.prod(dataset.shape)} images")
    return h5py.Dataset(_in_file(dataset))[()].ravel()


def _column(dataset: h5d.DatasetID, dtype: np.dtype, memory_type: h5t.TypeID) -> np.ndarray:
    length = math.prod(dataset.shape)
    if length > LONGEST_COLUMN:
        raise ValueError(f"a column of {length} entries")
    values = np.empty(dataset.shape, dtype)
    _in_file(dataset).read(h5s.ALL, h5s.ALL, values, mtype=memory_type)
    return values.ravel()
