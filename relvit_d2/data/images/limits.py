"""Limits of an image file: reading one takes at most about 5 seconds and 1 GiB of memory, whatever it contains."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from relvit_d2.data.images.archive import MAX_SIZE, ImageFile, Member

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of Pillow that are read; others, such as EPS, run programs or have no bound of time and memory."""

MAX_PIXELS = 2**26
"""Maximum number of pixels; Pillow takes 4 bytes for each, and there may be three copies."""

MAX_BYTES = 4 * MAX_PIXELS
"""Maximum size of the pixels of an image with many channels or a high bit depth."""

MAX_EXIF = 2**16
"""Maximum size of EXIF data: each of its entries may refer to all of it, and Pillow copies each one."""

LARGE_IMAGE = "reduce it, or detect in it by relvit-d2 predict --tiles"  # what to do with it

# Pillow's decoders that are written in Python, and the one of WebP, which has three images in memory.
_DIVISORS = {"ppm_plain": 16, "webp": 2}
_MAX_SCANS = 2**31  # pixels times scans of a progressive JPEG
_HEADER_READS, _READS = 10_000, 2**18  # a library may read single bytes in a loop
_METADATA = 2**26  # bytes


class LimitError(Exception):
    """An image file exceeds a limit; the message completes ``image 'NAME' ...``. No OSError: Pillow ignores some."""


class SizeLimitError(LimitError):
    """An image is too large to be read at once."""

    def __init__(self, what: str, value: int, limit: int) -> None:
        super().__init__(f"has {value:,} {what}, above the limit of {limit:,}: {LARGE_IMAGE}")


def check_limit(what: str, value: int, limit: int) -> None:
    """Raise a :class:`LimitError` if ``value`` exceeds ``limit``."""
    if value > limit:
        raise LimitError(f"has {value:,} {what}, above the limit of {limit:,}: replace it by a smaller one")


class _Limited:
    """Limits the reads of a file and their bytes: entries of a TIFF may all refer to the same megabytes."""

    reads_left = _HEADER_READS
    bytes_left = _METADATA
    exif = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads_left -= 1
        data: bytes = super().read(size)  # type: ignore[misc]
        self.bytes_left -= len(data)
        if self.reads_left < 0 or self.bytes_left < 0:
            raise LimitError("has too many or too large parts: save it anew")
        if data.startswith(b"Exif\0\0"):  # Pillow joins such segments of a JPEG and parses them at once
            self.exif += len(data)
            check_limit("bytes of EXIF data", self.exif, MAX_EXIF)
        return data


class _LimitedFile(_Limited, io.BufferedReader):
    pass


class _LimitedBytes(_Limited, io.BytesIO):
    pass


@contextmanager
def open_image(source: ImageFile | str | bytes | bytearray) -> Iterator[Image.Image]:
    """Open an image file, or its bytes, without decoding it.

    Raises:
        LimitError: the image would take too much time or memory.
        Exception: Pillow cannot open it.
    """
    with _opened(source) as file:
        size = file.seek(0, io.SEEK_END)
        if size > MAX_SIZE:
            raise SizeLimitError("bytes", size, MAX_SIZE)
        file.seek(0)
        file.bytes_left += size
        with Image.open(file, formats=FORMATS) as image:
            check_size(image)
            file.reads_left, file.bytes_left = _READS, 2 * size + _METADATA
            yield image


def check_scans(width: int, height: int, data: bytes | bytearray) -> None:
    """Raise a :class:`LimitError` if a JPEG, with the bytes ``data``, has too many scans for its pixels."""
    scans = data.count(b"\xff\xda")  # which occurs elsewhere in metadata only
    check_limit("scans", scans, _MAX_SCANS // max(width * height, 1))


def _opened(source: ImageFile | str | bytes | bytearray) -> Any:
    """Open a file; given a path, Pillow maps it, which gives wrong pixels for TIFF files with an orientation."""
    if isinstance(source, bytes | bytearray):
        return _LimitedBytes(source)
    if isinstance(source, Member):
        return _LimitedBytes(source.open().getvalue())
    return _LimitedFile(io.FileIO(Path(source)))


def check_size(image: Image.Image) -> None:
    """Raise a :class:`LimitError` for an opened image with too many pixels to decode them."""
    width, height = image.size
    decoder = "webp" if image.format == "WEBP" else getattr(image, "tile", [("",)])[:1][0][0]
    tags = getattr(image, "tag_v2", {})
    width, height = max(width, tags.get(322, 0)), max(height, tags.get(323, 0))  # of a tile, in TIFF 6.0
    pixels, limit = width * height, MAX_PIXELS // _DIVISORS.get(decoder, 1)
    if pixels > limit:
        raise SizeLimitError("pixels", pixels, limit)
