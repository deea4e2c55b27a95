"""Images that are read in horizontal strips, so that memory does not grow with their height."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relvit_d2.data.images.decode import PixelFormat, UnreadableImageError
from relvit_d2.data.images.limits import SizeLimitError
from relvit_d2.utils.errors import UserError

OVERVIEW = 4096  # maximum of the longer side of a reduced image, pixels


class StripImage:
    """An image that can be read once, from top to bottom.

    Attributes:
        width, height: its size in pixels.
        overview: the whole image, reduced to at most :data:`OVERVIEW` pixels on the longer side, ``(h, w, channels)``.
    """

    def __init__(self, width: int, height: int, overview: np.ndarray, read: Callable[[int, int], np.ndarray]) -> None:
        self.width, self.height, self.overview = width, height, overview
        self._read = read

    @classmethod
    def of(cls, pixels: np.ndarray) -> "StripImage":
        """Return an image ``(H, W, channels)`` in memory as one to read in strips; its overview is not reduced."""
        height, width = pixels.shape[:2]
        return cls(width, height, pixels, lambda top, bottom: pixels[top:bottom])

    def strips(self, tops: Sequence[int], height: int) -> Iterator[np.ndarray]:
        """Yield the rows ``top`` to ``top + height``, ``(height, W, channels)``, for each of ``tops``, which rise.

        Raises:
            UnreadableImageError: the file is damaged.
        """
        rows, start, end = None, 0, 0
        for top in tops:
            bottom = min(top + height, self.height)
            fresh = self._read(max(end, top), bottom)
            rows = fresh if rows is None or top >= end else np.concatenate((rows[top - start :], fresh))
            start, end = top, bottom
            yield rows


def open_strips(path: Path, pixels: PixelFormat) -> StripImage:
    """Open an image of any size; one with too many pixels to be read at once is read in strips by libvips.

    Raises:
        UnreadableImageError: the file is missing, damaged or not an image.
        UserError: the image does not have this format; or it is too large to be read at once, and pyvips is not
            installed, or the image is not an upright one of 8 bits.
    """
    try:
        return StripImage.of(pixels.read(path))
    except UnreadableImageError as error:
        if not isinstance(error.__cause__, SizeLimitError | Image.DecompressionBombError):
            raise
    return _open_large(path, pixels.channels)


def _open_large(path: Path, channels: int) -> StripImage:
    try:
        import pyvips  # optional
    except (ImportError, OSError) as error:
        raise UserError(
            f"image '{path}' is too large to be read at once, and pyvips, which reads it in strips, is not installed: "
            "run pip install 'relvit_d2[large]'"
        ) from error
    pyvips.block_untrusted_set(True)  # decoders that are not tested with damaged files

    @contextmanager
    def reading() -> Iterator[None]:
        try:
            yield
        except pyvips.Error as error:
            reason = str(error).strip().splitlines()[-1]
            raise UnreadableImageError(f"image '{path}' is damaged or truncated ({reason}): replace it") from error

    with reading():
        image = _without_alpha(pyvips.Image.new_from_file(str(path), access="sequential", fail_on="truncated"))
        _check_format(image, path, channels)
        size = {"height": OVERVIEW, "size": "down", "no_rotate": True}
        small = _without_alpha(pyvips.Image.thumbnail(str(path), OVERVIEW, fail_on="truncated", **size))
        overview = small.numpy().reshape(small.height, small.width, -1)
        region = pyvips.Region.new(image)  # reads in this thread; several would read out of order

    def read(top: int, bottom: int) -> np.ndarray:
        shape = bottom - top, image.width, image.bands
        if top == bottom:
            return np.empty((*shape[:2], channels), np.uint8)
        with reading():
            rows = np.frombuffer(region.fetch(0, top, image.width, bottom - top), np.uint8).reshape(shape)
        return rows.repeat(channels // image.bands, axis=2)

    return StripImage(image.width, image.height, overview.repeat(channels // image.bands, axis=2), read)


def _without_alpha(image: Any) -> Any:
    return image.extract_band(0, n=image.bands - 1) if image.hasalpha() else image


def _check_format(image: Any, path: Path, channels: int) -> None:
    """Raise a :class:`UserError` unless an opened image without alpha can be read in this number of channels."""
    upright = "orientation" not in image.get_fields() or image.get("orientation") == 1
    if image.format != "uchar" or image.bands not in {1, channels} or channels not in (1, 3) or not upright:
        raise UserError(
            f"image '{path}' is too large to be read at once, and is read in strips only if it is upright, has 8 bits "
            f"and {' or '.join(sorted({'1', str(channels)}))} channels: convert it"
        )
