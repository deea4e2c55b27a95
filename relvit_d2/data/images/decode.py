"""Decodes image files of any format, bit depth and number of channels to 8 bits."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from relvit_d2.data.images.archive import ImageFile, Member
from relvit_d2.data.images.jpeg import read_plain_jpeg
from relvit_d2.data.images.limits import (
    FORMATS,
    LARGE_IMAGE,
    MAX_BYTES,
    MAX_PIXELS,
    LimitError,
    check_limit,
    check_scans,
    check_size,
    open_image,
)
from relvit_d2.data.images.orientation import SWAPPED, orientation, upright
from relvit_d2.utils.errors import UserError, resource_error

ImageInput = str | Path | Image.Image | np.ndarray

DEEP_MODES = ("I", "F")  # Pillow's modes of more than eight bits, beside those that begin with I;16
BLOCK = 2**20  # values that are converted at once
HEADER = 2**18  # bytes of an archive's member that are read to find the header
MAX_16 = 65535  # the maximum of 16 bits
MAX_PAGES = 512  # of a TIFF that are counted as channels

# Exceptions of Pillow and NumPy for damaged files.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    LookupError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class UnreadableImageError(UserError):
    """An image file cannot be read; other images may be readable."""


@contextmanager
def reading(path: ImageFile | str) -> Iterator[None]:
    """Raise an :class:`UnreadableImageError` with ``path`` in place of any exception for a damaged image."""
    try:
        yield
    except FileNotFoundError as error:
        raise UnreadableImageError(
            f"image '{path}' does not exist: restore it, or remove it from the data set's list"
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"'{path}' is not an image that can be read: replace it by one of {', '.join(FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"image '{path}' has too many pixels ({error}): {LARGE_IMAGE}") from error
    except LimitError as error:
        raise UnreadableImageError(f"image '{path}' {error}") from error
    except DAMAGE as error:
        if isinstance(error, OSError) and (lack := resource_error(error)):  # not the image's fault
            raise lack from error
        raise UnreadableImageError(f"image '{path}' is damaged or truncated ({error}): replace it") from error


@dataclass(frozen=True)
class PixelFormat:
    """The format of decoded images.

    Attributes:
        channels: 3 for RGB, 1 for grayscale; any other number must be the number of an image's bands, of the pages of
            a TIFF with one band each, or of the last axis of a ``.npy`` array.
        max_value: the value that becomes 255 for images of more than 8 bits; 0 for 65535, the maximum of 16 bits.
    """

    channels: int = 3
    max_value: float = 0.0

    @classmethod
    def of(cls, cfg: CfgNode) -> "PixelFormat":
        """Return the format of ``INPUT.CHANNELS`` and ``INPUT.MAX_VALUE``; 8-bit RGB if the task has no such keys."""
        return cls(cfg.INPUT.get("CHANNELS", 3), cfg.INPUT.get("MAX_VALUE", 0))

    def read(self, path: ImageFile | str, longest: int = 0) -> np.ndarray:
        """Read an image, uint8, ``(H, W, channels)``, upright according to its EXIF orientation.

        The pixels of an RGB image are bitwise identical to those of Pillow and of Detectron2's ``read_image``. For RGB,
        grayscale images get three equal channels, and an alpha channel is dropped.

        Args:
            longest: if above 0, the maximum of the longer side in pixels; larger images are reduced with antialiasing
                (a JPEG is decoded at a reduced size of at least twice the result).

        Raises:
            UnreadableImageError: the file is missing, damaged or not an image.
            UserError: it has another number of channels, or values of unknown range.
        """
        with reading(path):
            if self.channels == 3 and (plain := read_plain_jpeg(path, longest)) is not None:
                return plain
            if str(path).lower().endswith(".npy"):
                return self._fitted(_load_array(path), path, longest)
            with open_image(path) as image:
                if isinstance(image, JpegImageFile) and image.fp:
                    image.fp.seek(0)
                    check_scans(*image.size, image.fp.read())
                return self._of(image, path, longest)

    def convert(self, image: Image.Image) -> np.ndarray:
        """Return an opened Pillow image as :meth:`read` returns its file; errors as there."""
        name = str(getattr(image, "filename", "")) or "Pillow image"
        with reading(name):
            return self._of(image, name)

    def array(self, image: ImageInput) -> np.ndarray:
        """Return a file, an opened Pillow image or an array as :meth:`read` returns a file.

        Raises:
            UserError: a file cannot be read, or an array has another dtype or shape than ``(H, W, channels)`` of uint8.
        """
        if isinstance(image, str | Path):
            return self.read(image)
        if isinstance(image, Image.Image):
            image = self.convert(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != self.channels or not image.size:
            raise UserError(
                f"an array of {image.dtype} and shape {image.shape} is not an image: give uint8, height x width x "
                f"{self.channels}"
            )
        return np.require(image, requirements="W")  # torch warns about read-only arrays

    def _of(self, image: Image.Image, path: ImageFile | str, longest: int = 0) -> np.ndarray:
        mode = ("L", "RGB")[self.channels == 3]
        stored = orientation(image)
        if self.channels not in (1, 3) or _is_deep(image):
            return self._fitted(_bands(image, self.channels, stored), path, longest)
        reduced: Image.Image = image
        size = _reduced(image.size, longest)
        if size != image.size:
            image.draft(mode, (2 * size[0], 2 * size[1]))
            reduced = image.convert(mode).resize(size, Image.Resampling.BILINEAR)
        return _converted(upright(reduced, stored), mode)

    def _fitted(self, pixels: np.ndarray, path: ImageFile | str, longest: int) -> np.ndarray:
        """Convert pixels ``(H, W)`` or ``(H, W, C)`` of any type to this format."""
        repeats = self.channels if pixels.ndim == 2 and self.channels in (1, 3) else 1
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if pixels.ndim != 3 or not pixels.size:
            raise ValueError(f"an array of shape {pixels.shape} is not an image")
        if repeats * pixels.shape[2] != self.channels:
            raise UserError(
                f"image '{path}' has {pixels.shape[2]} channels, but INPUT.CHANNELS is {self.channels}: set it to "
                f"{pixels.shape[2]}, with as many values in MODEL.PIXEL_MEAN and MODEL.PIXEL_STD"
            )
        pixels = np.repeat(self._in_eight_bits(pixels, path), repeats, axis=2)
        size = _reduced((pixels.shape[1], pixels.shape[0]), longest)
        if size != (pixels.shape[1], pixels.shape[0]):
            planes = [
                Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR) for plane in np.moveaxis(pixels, 2, 0)
            ]
            pixels = np.stack([np.array(plane) for plane in planes], axis=2)
        return np.ascontiguousarray(pixels)

    def _in_eight_bits(self, pixels: np.ndarray, path: ImageFile | str) -> np.ndarray:
        if pixels.dtype == np.uint8:
            return pixels
        if pixels.dtype.kind not in "uif":
            raise ValueError(f"an array of {pixels.dtype} is not an image")
        max_value = self.max_value or (MAX_16 if pixels.dtype.itemsize == 2 and pixels.dtype.kind == "u" else 0)
        if not max_value:
            raise UserError(
                f"image '{path}' contains {pixels.dtype} numbers, whose range is unknown: set INPUT.MAX_VALUE to "
                "the value of white, or convert the image to 8 bits"
            )
        converted = np.empty(pixels.shape, np.uint8)
        rows = 1 + BLOCK // pixels[0].size  # at a time, to save memory
        for start in range(0, len(pixels), rows):
            scaled = pixels[start : start + rows].astype(np.float32) * (255 / max_value)
            if not np.isfinite(scaled).all():
                raise ValueError("values that are not finite")
            converted[start : start + rows] = scaled.clip(0, 255).round()
        return converted


def read_rgb(path: ImageFile | str, longest: int = 0) -> np.ndarray:
    """Read an image as RGB: see :meth:`PixelFormat.read`."""
    return PixelFormat().read(path, longest)


def image_size(path: ImageFile | str) -> tuple[int, int]:
    """Return ``(width, height)`` in pixels from the file's header, upright; no pixel is decoded.

    Of a member of an archive, only its first bytes are read if they suffice.

    Raises:
        UnreadableImageError: the file is missing or not an image.
    """
    with reading(path):
        if str(path).lower().endswith(".npy"):
            height, width = _load_array(path).shape[:2]
            return width, height
        if isinstance(path, Member) and path.size > HEADER:
            with suppress(*DAMAGE), open_image(path.open(HEADER).getvalue()) as image:  # metadata may be longer
                if image.format != "PNG":  # whose orientation may follow the pixels
                    return _upright_size(image)
        with open_image(path) as image:
            return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if orientation(image) in SWAPPED else image.size


def size_if_readable(path: ImageFile | str) -> tuple[int, int]:
    """Return :func:`image_size`, or (0, 0) for an image whose header cannot be read."""
    try:
        return image_size(path)
    except UnreadableImageError:
        return 0, 0


def channels_and_max_value(path: ImageFile | str) -> tuple[int, float]:
    """Return the number of channels of an image and its largest value, 0 for an image of 8 bits.

    Color images of any mode count as RGB, with or without alpha; pages of a TIFF with one band each count as channels.

    Raises:
        UnreadableImageError: the file is missing, damaged or not an image.
    """
    with reading(path):
        if str(path).lower().endswith(".npy"):
            values = _load_array(path)
            return values.shape[2] if values.ndim == 3 else 1, _largest(values)
        with open_image(path) as image:
            gray = image.mode in ("1", "L", "LA") or _is_deep(image)
            return _pages(image, MAX_PAGES) if gray else 3, _largest(np.array(image)) if _is_deep(image) else 0.0


def _largest(values: np.ndarray) -> float:
    return float(values.max()) if values.size and values.dtype.itemsize > 1 else 0.0


def _load_array(path: ImageFile | str) -> np.ndarray:
    # Unlike an array in memory, a mapping cannot be larger than the file, whatever the header declares.
    if isinstance(path, Member):
        pixels = np.load(path.open(), allow_pickle=False)
    else:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(pixels, np.ndarray) or pixels.ndim not in (2, 3):
        raise ValueError("not an array of height, width and channels")
    check_limit("pixels", pixels.shape[0] * pixels.shape[1], MAX_PIXELS)
    check_limit("bytes of pixels", pixels.nbytes, MAX_BYTES)
    return pixels


def _converted(image: Image.Image, mode: str) -> np.ndarray:
    """Return the pixels ``(H, W, C)`` of an image in the mode ``L`` or ``RGB``, converted in parts to save memory."""
    pixels = np.empty((image.height, image.width, len(mode)), np.uint8)
    rows = 1 + BLOCK // image.width
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert(mode)
        pixels[top : top + rows] = np.asarray(part).reshape(-1, *pixels.shape[1:])
    return pixels


def _is_deep(image: Image.Image) -> bool:
    return image.mode in DEEP_MODES or image.mode.startswith("I;16")


def _bands(image: Image.Image, channels: int, stored: int) -> np.ndarray:
    """Return the bands of an image, or of the pages of a TIFF with one band each, upright."""
    if _pages(image, channels + 1) == channels > 1 and len(image.getbands()) == 1:
        first, planes = image.tell(), []
        for page in range(channels):
            image.seek(page)
            check_size(image)
            planes.append(np.array(image))
            check_limit("bytes of pixels", channels * planes[0].nbytes, MAX_BYTES)
        image.seek(first)
        return np.stack(planes, axis=2)
    return np.array(upright(image, stored))


def _pages(image: Image.Image, most: int) -> int:
    """Return the number of pages, at most ``most``; 1 for an animation."""
    if image.format != "TIFF":
        return 1
    first = image.tell()
    try:
        for page in range(most):
            image.seek(page)
    except EOFError:
        return page
    finally:
        image.seek(first)
    return most


def _reduced(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return width and height, reduced so that the longer side has at most ``longest`` pixels; 0: no limit."""
    if not longest or max(size) <= longest:
        return size
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
