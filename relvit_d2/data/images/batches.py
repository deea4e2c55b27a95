"""Batches of images without records, from memory or files: shuffled for training, ordered for evaluation."""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, overload

import numpy as np
import torch
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import Tensor

from relvit_d2.data.detection.mapper import ImageReader, pad_images
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.data.loader import Batches, EndlessOrder, ordered_batches
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.loader_workers import loader_workers
from relvit_d2.utils.randomness import image_keys

Images = Sequence[Any]  # an ImageStack, or image files for ImageReader

logger = logging.getLogger(__name__)


class ImageStack(Sequence[Tensor]):
    """Decoded images of one size.

    Args:
        pixels: ``(n, 3, h, w)`` uint8 RGB, on any device.
        name: of the data set, for messages.
    """

    def __init__(self, pixels: Tensor, name: str) -> None:
        self.pixels, self.name = pixels, name

    def __len__(self) -> int:
        return len(self.pixels)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageStack": ...
    def __getitem__(self, index: int | slice) -> "Tensor | ImageStack":
        part = self.pixels[index]
        return ImageStack(part, self.name) if isinstance(index, slice) else part

    def to(self, device: str) -> "ImageStack":
        """Return the images on another device."""
        return ImageStack(self.pixels.to(device), self.name)


def take(images: Images, index: Tensor) -> Images:
    """Return the images with the indices ``index``, ``(n,)`` int64."""
    if isinstance(images, ImageStack):
        return ImageStack(images.pixels[index], images.name)
    return [images[i] for i in index.tolist()]


def joined(parts: Sequence[Images]) -> Images:
    """Concatenate images; the result is a stack if all parts are stacks of one image size."""
    stacks = [part for part in parts if isinstance(part, ImageStack)]
    if len(parts) == 1:
        return parts[0]
    if len(stacks) == len(parts) and len({stack.pixels.shape[1:] for stack in stacks}) == 1:
        name = ", ".join(dict.fromkeys(stack.name for stack in stacks))
        return ImageStack(torch.cat([stack.pixels for stack in stacks]), name)
    return [image for part in parts for image in part]


class StackBatches:
    """The endless batches of one process from a stack, indexed on its device, without loader processes."""

    def __init__(self, stack: ImageStack, order: EndlessOrder) -> None:
        self._stack, self._order = stack, order
        self.replaced: list[str] = []
        self.used: list[int] = []

    def __iter__(self) -> Generator[dict[str, Tensor], None, None]:
        pixels = self._stack.pixels
        for keys in self._order:
            self.used = [index for _, index in keys]
            index = torch.tensor(self.used).to(pixels.device, non_blocking=True)
            yield {"images": pixels[index], "sizes": _sizes(pixels, len(keys))}

    def names(self, iteration: int) -> list[Any]:
        """Return names of the images of an iteration, for messages."""
        return [f"image {index} of {self._stack.name}" for _, index in self._order.keys(iteration)]


class TrainingBatches:
    """Endless batches of images, each image with a random key for its view.

    A batch is that of :func:`relvit_d2.data.detection.mapper.pad_images` with ``keys``, ``(B,)`` int64, each a function
    of the seed, the epoch and the image (see :meth:`relvit_d2.pretext.views.Views.train`) and ``labels``, ``(B,)``
    int64, if given. An image's view therefore does not depend on the number of processes or accumulation steps. With
    ``DATASETS.SKIP_UNREADABLE`` an unreadable image is replaced by the next one, which has its own label.

    Args:
        images: a stack, or files that the loader's processes read.
        start: the first iteration.
        labels: ``(n,)`` int64, one per image.
    """

    def __init__(self, cfg: CfgNode, images: Images, start: int, labels: Tensor | None = None) -> None:
        solver, self._seed, self._labels = cfg.SOLVER, cfg.SEED, labels
        rank, world = comm.get_rank(), comm.get_world_size()
        self._order = EndlessOrder(
            len(images), solver.IMS_PER_BATCH, cfg.SEED, start, rank, world, solver.GRAD_ACCUM_STEPS
        )
        self._batches: StackBatches | Batches
        if isinstance(images, ImageStack):
            _check_channels(cfg, images)
            self._batches = StackBatches(images.to(cfg.MODEL.DEVICE), self._order)
        else:
            options = ImageReader.of(cfg), pad_images, self._order, cfg.SEED
            workers, timeout = loader_workers(cfg), cfg.DATALOADER.TIMEOUT
            self._batches = Batches(images, *options, workers, timeout, cfg.DATASETS.SKIP_UNREADABLE)

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        with closing(iter(self._batches)) as batches:
            for samples, batch in zip(self._order, batches, strict=False):  # both are endless
                epochs, index = torch.tensor(samples).unbind(1)
                labels = {} if self._labels is None else {"labels": self._labels[self._batches.used]}
                yield batch | {"keys": image_keys(self._seed, "views", epochs, index)} | labels

    @property
    def replaced(self) -> list[str]:
        """Files of the unreadable images so far."""
        return self._batches.replaced

    def names(self, iteration: int) -> list[Any]:
        """Return names of the images of an iteration, for messages."""
        return self._batches.names(iteration)


def fixed_batches(cfg: CfgNode, images: Images, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield this process's share of the images in order, in batches of at most ``size``.

    Each batch is that of :func:`relvit_d2.data.detection.mapper.pad_images` with ``keys``, the images' indices,
    ``(B,)`` int64. With ``DATASETS.SKIP_UNREADABLE`` unreadable images are left out.
    """
    rank, world = comm.get_rank(), comm.get_world_size()
    if isinstance(images, ImageStack):
        _check_channels(cfg, images)
        share = np.array_split(np.arange(len(images)), world)[rank]
        for start in range(0, len(share), size):
            keys = torch.from_numpy(share[start : start + size])
            pixels = images.pixels[int(keys[0]) : int(keys[-1]) + 1]
            yield {"images": pixels, "sizes": _sizes(pixels, len(keys)), "keys": keys}
        return
    options = ImageReader.of(cfg), pad_images, size, loader_workers(cfg), rank, world, cfg.DATALOADER.TIMEOUT
    batches = ordered_batches(images, *options, leaves_out=cfg.DATASETS.SKIP_UNREADABLE)
    for batch in batches:
        yield batch | {"keys": torch.tensor(batches.used)}


def count_left_out(read: int, images: int, name: str) -> int:
    """Return how many ``images`` of a data set are missing in those that an evaluation ``read``, and log them.

    Raises:
        UserError: none was read.
    """
    if not read:
        raise UserError(f"none of the {images} images of {name} can be read: replace them")
    if left_out := images - read:
        logger.warning(f"{left_out} of {images} images of {name} cannot be read and are left out of the results")
    return left_out


def _check_channels(cfg: CfgNode, images: ImageStack) -> None:
    channels, expected = images.pixels.shape[1], PixelFormat.of(cfg).channels
    if channels != expected:
        raise UserError(
            f"the images of '{images.name}' have {channels} channels, but INPUT.CHANNELS is {expected}: "
            f"set it to {channels}"
        )


def _sizes(pixels: Tensor, count: int) -> Tensor:
    return torch.tensor(pixels.shape[2:]).expand(count, 2)
