"""Fast decoding of JPEG files whose pixels do not depend on the decoder."""

import io
import struct
import sys

import numpy as np

from relvit_d2.data.images.archive import MAX_SIZE, ImageFile, Member
from relvit_d2.data.images.limits import MAX_PIXELS, check_limit, check_scans, open_image
from relvit_d2.data.images.orientation import orientation

START = b"\xff\xd8"
# Markers of ITU-T T.81, table B.1. APP1 holds EXIF and XMP data.
FRAMES, SCAN, APP1 = (0xC0, 0xC1, 0xC2), 0xDA, 0xE1
IGNORED = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restart interval, comment, application data


def read_plain_jpeg(path: ImageFile | str, longest: int = 0) -> np.ndarray | None:
    """Return the RGB pixels of an upright JPEG file, uint8 ``(H, W, 3)``, or None if Pillow must decode the file.

    That is also the case if ``longest`` is above 0 and the longer side has more pixels, and in a process that has not
    imported torch, since that takes longer than many images.

    The pixels are bitwise identical to Pillow's: both use libjpeg-turbo with its default settings. This takes two
    thirds of the time, since it reads the file at once.

    Raises:
        OSError: the file cannot be read.
        LimitError: it exceeds a limit.
    """
    if sys.modules.get("torch") is None:
        return None
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    with path.open() if isinstance(path, Member) else open(path, "rb", buffering=0) as file:
        if file.read(2) != START:
            return None
        size = file.seek(0, io.SEEK_END)
        check_limit("bytes", size, MAX_SIZE)
        data = bytearray(size)
        file.seek(0)
        file.readinto(data)  # type: ignore[attr-defined]
    width, height = _plain_size(data)
    if not 0 < width * height <= MAX_PIXELS or 0 < longest < max(width, height):
        return None
    check_scans(width, height, data)
    try:
        pixels = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:  # Pillow reports the error better, or tolerates it
        return None
    return pixels.permute(1, 2, 0).numpy()


def _plain_size(data: bytearray) -> tuple[int, int]:
    """Return width and height from a JPEG's header; zeros if damaged, not upright, or not grayscale or RGB."""
    size, at = (0, 0), len(START)
    while at + 4 <= len(data):
        start, marker, length = struct.unpack_from(">BBH", data, at)
        if start != 0xFF:
            break
        if marker == SCAN:
            return size
        if marker in FRAMES and at + 10 <= len(data):
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            size = (width, height) if bits == 8 and components in (1, 3) else (0, 0)
        elif marker not in IGNORED or (marker == APP1 and not _is_upright(data)):
            break
        at += 2 + length
    return 0, 0


def _is_upright(data: bytearray) -> bool:
    """Whether the image is stored upright."""
    try:
        with open_image(data) as image:
            return orientation(image) == 1
    except Exception:  # Pillow raises various exceptions for a damaged file
        return False
