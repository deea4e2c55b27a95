"""EXIF orientation of images, for their size and for their pixels."""

import io
import struct
import zlib

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from relvit_d2.data.images.limits import MAX_EXIF, LimitError, check_limit

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transpose that makes an image upright, by the value of EXIF 2.3's tag 0x0112."""

SWAPPED = (5, 6, 7, 8)
"""Orientations that exchange width and height."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks that may hold EXIF or XMP data


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image's pixels, 1 to 8, without decoding or changing it.

    It is that of Detectron2's ``read_image``, except for TIFF files, which Pillow makes upright itself. Damaged
    metadata are ignored.

    Raises:
        LimitError: the metadata are too large.
    """
    if image.format == "TIFF":
        return 1
    try:
        source = image
        if isinstance(image, PngImageFile) and "exif" not in image.info:
            source = _without_pixels(image) or image
        text = source.info.get("Raw profile type exif", "")  # hexadecimal
        check_limit("bytes of EXIF data", max(len(source.info.get("exif", b"")), len(text) // 2), MAX_EXIF)
        # PngImageFile.getexif would decode the pixels to find chunks after them.
        found = Image.Image.getexif(source).get(ExifTags.Base.Orientation)
    except LimitError:
        raise
    except Exception:  # Pillow raises various exceptions for a damaged file
        return 1
    return found if found in TURNS else 1


def upright(image: Image.Image, stored: int) -> Image.Image:
    """Return an image (or a reduced copy) with the :func:`orientation` ``stored`` upright."""
    return image.transpose(TURNS[stored]) if stored in TURNS else image


def _without_pixels(image: PngImageFile) -> Image.Image | None:
    """Return an empty PNG with the metadata before and after the pixels of a PNG file; None if it has none."""
    file = image.fp
    if file is None:  # loaded, so that Pillow has read all chunks
        return None
    position = file.tell()
    chunks: list[tuple[bytes, bytes]] = []
    try:
        file.seek(len(_SIGNATURE))
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"IHDR", *_METADATA):
                chunks.append((kind, file.read(length)))
            else:
                file.seek(length, io.SEEK_CUR)
            file.seek(4, io.SEEK_CUR)  # checksum
            if kind == b"IEND":
                break
    finally:
        file.seek(position)
    if len(chunks) < 2:
        return None
    data = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (*chunks, (b"IDAT", b""), (b"IEND", b""))
    ]
    return Image.open(io.BytesIO(_SIGNATURE + b"".join(data)))
