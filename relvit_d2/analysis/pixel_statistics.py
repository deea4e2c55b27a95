"""Mean and deviation of the pixels of images, for ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from relvit_d2.data.images.archive import ImageFile
from relvit_d2.data.images.decode import PixelFormat, UnreadableImageError, channels_and_max_value
from relvit_d2.utils.errors import UserError

LOOKED_AT = 1000  # images, evenly spread over those given
LONGEST = (
    512  # pixels of the longer side that larger ones are reduced to: their mean stays, their deviation hardly falls
)


@dataclass(frozen=True)
class PixelStatistics:
    """What :func:`pixel_statistics` found.

    Attributes:
        mean, std: of each channel, 0..255; every pixel of every image counts once.
        images: how many could be read.
    """

    mean: list[float]
    std: list[float]
    images: int

    @classmethod
    def of(cls, histograms: Sequence[np.ndarray]) -> "PixelStatistics":
        """Return those of images, at least one, of which each has its :func:`histogram`."""
        counts, values = np.sum(histograms, axis=0), np.arange(256)
        total = counts.sum(1)
        mean = counts @ values / total
        std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
        return cls(mean.tolist(), std.tolist(), len(histograms))

    def config_lines(self) -> str:
        """Return mean and deviation as lines of a config file."""
        mean, std = ([round(value, 3) for value in values] for values in (self.mean, self.std))
        return f"MODEL:\n  PIXEL_MEAN: {mean}\n  PIXEL_STD: {std}"


def histogram(pixels: np.ndarray) -> np.ndarray:
    """Return how many pixels of an image, ``(H, W, C)`` uint8, have each value: ``(C, 256)`` int64."""
    return np.stack([np.bincount(plane.ravel(), minlength=256) for plane in np.moveaxis(pixels, 2, 0)])


def pixel_statistics(images: Sequence[ImageFile | str], pixels: PixelFormat, most: int = LOOKED_AT) -> PixelStatistics:
    """Return mean and standard deviation of each channel over the pixels of images.

    Args:
        images: files; of more than ``most``, ``most`` evenly spread ones are read.
        pixels: what they are turned into first.
        most: at least 1.

    Raises:
        UserError: not one can be read, or one has other channels.
    """
    histograms = []
    for image in _spread(images, most):
        with suppress(UnreadableImageError):
            histograms.append(histogram(pixels.read(image, LONGEST)))
    if not histograms:
        raise UserError(f"not one of the {len(images)} images can be read: give others")
    return PixelStatistics.of(histograms)


def pixel_format(images: Sequence[ImageFile | str], most: int = 50) -> PixelFormat:
    """Return the format of images that are not yet known: most images' channels, the largest value of deep ones.

    Args:
        images: files; of more than ``most``, ``most`` evenly spread ones are read.
        most: at least 1.

    Raises:
        UserError: not one can be read.
    """
    found: list[tuple[int, float]] = []
    for image in _spread(images, most):
        with suppress(UnreadableImageError):
            found.append(channels_and_max_value(image))
    if not found:
        raise UserError(f"not one of the {len(images)} images can be read: give others")
    channels = [channels for channels, _ in found]
    return PixelFormat(max(sorted(set(channels)), key=channels.count), math.ceil(max(white for _, white in found)))


def _spread(images: Sequence[ImageFile | str], most: int) -> list[ImageFile | str]:
    if len(images) <= most:
        return list(images)
    return [images[index] for index in np.linspace(0, len(images) - 1, most).astype(int)]
