"""Mean and deviation of the pixels of images, for ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from relvit_d2.data.archive import ImageFile
from relvit_d2.data.decode import PixelFormat, UnreadableImageError, channels_and_white
from relvit_d2.errors import UserError

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

    def config_lines(self) -> str:
        """Return mean and deviation as lines of a config file."""
        mean, std = ([round(value, 3) for value in values] for values in (self.mean, self.std))
        return f"MODEL:\n  PIXEL_MEAN: {mean}\n  PIXEL_STD: {std}"


def pixel_statistics(images: Sequence[ImageFile | str], pixels: PixelFormat, most: int = LOOKED_AT) -> PixelStatistics:
    """Return mean and standard deviation of each channel over the pixels of images.

    Args:
        images: files; of more than ``most``, ``most`` evenly spread ones are read.
        pixels: what they are turned into first.
        most: at least 1.

    Raises:
        UserError: not one can be read, or one has other channels.
    """
    count, total, squares, read = 0, np.zeros(pixels.channels), np.zeros(pixels.channels), 0
    for image in _spread(images, most):
        try:
            values = pixels.read(image, LONGEST).reshape(-1, pixels.channels).astype(np.float64)
        except UnreadableImageError:
            continue
        count, read = count + len(values), read + 1
        total += values.sum(0)
        squares += np.square(values).sum(0)
    if not count:
        raise UserError(f"not one of the {len(images)} images can be read: give others")
    mean = total / count
    return PixelStatistics(mean.tolist(), np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist(), read)


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
            found.append(channels_and_white(image))
    if not found:
        raise UserError(f"not one of the {len(images)} images can be read: give others")
    channels = [channels for channels, _ in found]
    return PixelFormat(max(sorted(set(channels)), key=channels.count), math.ceil(max(white for _, white in found)))


def _spread(images: Sequence[ImageFile | str], most: int) -> list[ImageFile | str]:
    if len(images) <= most:
        return list(images)
    return [images[index] for index in np.linspace(0, len(images) - 1, most).astype(int)]
