"""Files that no library writes: a PNG with a huge size in its header, MATLAB structures like SVHN's."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from relvit_d2.data.detection.svhn import FIELDS


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int = 100_000) -> bytes:
    """Return a PNG of a few bytes whose header declares ``side`` x ``side`` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def write_mat(path: Path, rows: Sequence[tuple[str, Sequence[tuple[float, ...]]]]) -> None:
    """Write rows ``(name, [(left, top, width, height, label), ...])`` in SVHN's MATLAB structure."""
    with h5py.File(path, "w") as file:
        names, boxes = [], []
        for index, (name, digits) in enumerate(rows):
            codes = np.array([[ord(letter)] for letter in name], np.uint16)
            names.append(file.create_dataset(f"#refs#/n{index}", data=codes).ref)
            group = file.create_group(f"#refs#/b{index}")
            boxes.append(group.ref)
            for field, values in zip(FIELDS, zip(*digits, strict=True), strict=True):
                if len(values) == 1:
                    group[field] = np.array([values], np.float64)
                else:
                    cells = [file.create_dataset(None, data=np.array([[value]])) for value in values]
                    for k, cell in enumerate(cells):
                        file[f"#refs#/{index}{field}{k}"] = cell
                    group[field] = np.array([[cell.ref] for cell in cells], h5py.ref_dtype)
        file["digitStruct/name"] = np.array([[name] for name in names], h5py.ref_dtype)
        file["digitStruct/bbox"] = np.array([[box] for box in boxes], h5py.ref_dtype)
