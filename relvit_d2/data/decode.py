"""Image files to pixels, faults to one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

from relvit_d2.errors import UserError


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn whatever goes wrong while the image ``path`` is read into a :class:`UserError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"image '{path}' does not exist; the data set lists it, so put it there or take it off the list"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"'{path}' is not an image that can be read; replace it") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"image '{path}' is larger than any photograph ({error}); scale it down") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image '{path}' is damaged or cut short ({error}); replace it") from error


def read_rgb(path: Path | str, longest: int = 0) -> np.ndarray:
    """Read an image as RGB, uint8, ``(H, W, 3)``, turned upright as its EXIF orientation says.

    The pixels are Pillow's, and so Detectron2's ``read_image``'s, to the bit.

    Args:
        path: the file.
        longest: if above 0, an image whose longer side has more pixels is reduced to it (antialiased; a JPEG is
            already decoded at a reduced size that is at least twice as large).

    Raises:
        UserError: if the file is missing, damaged or no image.
    """
    with reading(path), Image.open(path) as image:
        reduced: Image.Image = image
        if longest and max(image.size) > longest:
            scale = longest / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image.draft("RGB", (2 * size[0], 2 * size[1]))
            reduced = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        elif (pixels := _decode_plain_jpeg(image)) is not None:
            return pixels
        if _orientation(image) != 1:
            reduced = ImageOps.exif_transpose(reduced)
        return np.array(reduced.convert("RGB"))


def _decode_plain_jpeg(image: ImageFile.ImageFile) -> np.ndarray | None:
    """Return the pixels of an opened upright JPEG, decoded straight into an array; None if it is none, or damaged.

    Both decoders are libjpeg-turbo with the same settings; without Pillow's copies it takes two thirds of the time.
    """
    if image.format != "JPEG" or image.mode not in ("L", "RGB") or _orientation(image) != 1:
        return None
    image.fp.seek(0)
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:  # what is wrong Pillow says better, or puts up with
        return None
    return pixels.permute(1, 2, 0).numpy()


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8; 1, upright, where the EXIF data cannot be read, as Detectron2 does."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises whatever the damage leads to
        return 1
