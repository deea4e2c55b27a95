"""Arrays of numbers from MATLAB's files of level 5, in which SVHN's digits and Flower-102's labels come.

Source: "MAT-File Format", The MathWorks, chapter 1.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from relvit_d2.utils.errors import UserError

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_HEADER = 128  # bytes; the last two are IM where the lowest byte of a number comes first


def read_matlab5(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of numbers in a file by their names; what else it holds is left out.

    Raises:
        UserError: if the file is missing, damaged or none of level 5.
    """
    try:
        content = path.read_bytes()
        order = {b"IM": "<", b"MI": ">"}[content[_HEADER - 2 : _HEADER]]
        return dict(_arrays(memoryview(content)[_HEADER:], order))
    except (OSError, LookupError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"'{path}' is no MATLAB file of level 5 that can be read ({error}); get it anew") from error


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Give the kind and the bytes of the elements in ``data``."""
    start = 0
    while start < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, start)
        first, padded = start + 8, size + (-size % 8 if kind != _COMPRESSED else 0)
        if kind >> 16:  # an element of up to four bytes, which lie in its head
            kind, size, first, padded = kind & 0xFFFF, kind >> 16, start + 4, 4
        if first + size > len(data):
            raise ValueError("it is cut short")
        yield kind, data[first : first + size]
        start = first + padded


def _arrays(data: memoryview, order: str) -> Iterator[tuple[str, np.ndarray]]:
    for kind, content in _elements(data, order):
        if kind == _COMPRESSED:
            yield from _arrays(memoryview(zlib.decompress(content)), order)
        elif kind == _MATRIX:
            _, (_, shape), (_, name), *parts = _elements(content, order)
            if parts and parts[0][0] in _NUMBERS:
                values = np.frombuffer(parts[0][1], order + _NUMBERS[parts[0][0]])
                sides = np.frombuffer(shape, f"{order}i4")
                yield bytes(name).decode(), values.reshape(sides, order="F")
