"""Image files to pixels, faults to one sentence."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from relvit_d2.errors import UserError


@dataclass(frozen=True)
class PackedImage:
    """An image file that was read out of an archive.

    Attributes:
        name: the archive and the file in it.
        content: the file's bytes.
    """

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


ImageFile = Path | str | PackedImage


def opened(file: ImageFile) -> Image.Image:
    """Open an image without decoding it."""
    return Image.open(io.BytesIO(file.content) if isinstance(file, PackedImage) else file)


@contextmanager
def reading(path: ImageFile) -> Iterator[None]:
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


def read_rgb(path: ImageFile, longest: int = 0) -> np.ndarray:
    """Read an image as RGB, uint8, ``(H, W, 3)``, turned upright as its EXIF orientation says.

    Args:
        path: the file.
        longest: if above 0, an image whose longer side has more pixels is reduced to it (antialiased; a JPEG is
            already decoded at a reduced size that is at least twice as large).

    Raises:
        UserError: if the file is missing, damaged or no image.
    """
    with reading(path), opened(path) as image:
        reduced: Image.Image = image
        if longest and max(image.size) > longest:
            scale = longest / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image.draft("RGB", (2 * size[0], 2 * size[1]))
            reduced = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        return np.array(ImageOps.exif_transpose(reduced).convert("RGB"))
