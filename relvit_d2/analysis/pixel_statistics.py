"""Mean and standard deviation of pixels, for ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from relvit_d2.data.images.archive import ImageFile
from relvit_d2.data.images.decode import PixelFormat, UnreadableImageError, channels_and_max_value
from relvit_d2.utils.errors import UserError

T = TypeVar("T")

MAX_IMAGES = 1000
# Larger images are reduced to this many pixels on the longer side, which keeps the mean and nearly keeps the deviation.
LONGEST = 512


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation of each channel over the pixels of all images.

    Attributes:
        mean, std: one value per channel, 0..255.
        images: number of images read.
    """

    mean: list[float]
    std: list[float]
    images: int

    @classmethod
    def of(cls, histograms: Sequence[np.ndarray]) -> "PixelStatistics":
        """Compute the statistics from the :func:`histogram` of each image, one or more."""
        counts, values = np.sum(histograms, axis=0), np.arange(256)
        total = counts.sum(1)
        mean = counts @ values / total
        std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
        return cls(mean.tolist(), std.tolist(), len(histograms))

    def config_lines(self) -> str:
        """Return the statistics as lines of a config file."""
        mean, std = ([round(value, 3) for value in values] for values in (self.mean, self.std))
        return f"MODEL:\n  PIXEL_MEAN: {mean}\n  PIXEL_STD: {std}"


def histogram(pixels: np.ndarray) -> np.ndarray:
    """Return the histogram ``(C, 256)`` int64 of an image ``(H, W, C)`` uint8, of each channel."""
    return np.stack([np.bincount(plane.ravel(), minlength=256) for plane in np.moveaxis(pixels, 2, 0)])


def pixel_statistics(images: Sequence[ImageFile | str], pixels: PixelFormat, most: int = MAX_IMAGES) -> PixelStatistics:
    """Return mean and standard deviation of each channel over the pixels of images.

    Args:
        images: files, of which at most ``most``, evenly spaced, are read. Unreadable ones are skipped.
        pixels: format that the images are converted to first.
        most: at least 1.
    """
    return PixelStatistics.of(_of_each(images, most, lambda image: histogram(pixels.read(image, LONGEST))))


def pixel_format(images: Sequence[ImageFile | str], most: int = 50) -> PixelFormat:
    """Detect the format of images: the most frequent number of channels, and the largest value of any image.

    Args:
        images: files, of which at most ``most``, evenly spaced, are read. Unreadable ones are skipped.
        most: at least 1.
    """
    found = _of_each(images, most, channels_and_max_value)
    channels = [channels for channels, _ in found]
    return PixelFormat(max(sorted(set(channels)), key=channels.count), math.ceil(max(white for _, white in found)))


def _of_each(images: Sequence[ImageFile | str], most: int, read: Callable[[ImageFile | str], T]) -> list[T]:
    """Return ``read(image)`` for up to ``most`` evenly spaced images that can be read, at least one."""
    results = []
    for index in np.linspace(0, len(images) - 1, min(most, len(images))).astype(int):
        with suppress(UnreadableImageError):
            results.append(read(images[index]))
    if not results:
        raise UserError(f"none of the {len(images)} images can be read: give other images")
    return results
