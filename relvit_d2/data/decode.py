"""Image files to pixels, faults to one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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
        return np.array(ImageOps.exif_transpose(reduced).convert("RGB"))
