"""Crops of uint8 images, resized, mirrored and cut into mega-patches, by products with weights along each axis."""

import math
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from relvit_d2.utils.hashing import hashed_uniform

TRIES = 10  # torchvision's RandomResizedCrop
# Pixels of images that a CPU resizes one by one: the products of larger ones are mostly with zeros.
LARGE = 2**14


class Draw(IntEnum):
    """What a random number of a view decides. It is hashed from an image's key, this, and a counter."""

    ROW_CUTS = 0
    COLUMN_CUTS = 1
    SLOT = 2
    CROP_AREA = 3
    CROP_RATIO = 4
    CROP_CORNER = 5
    FLIP = 6
    PAD_CORNER = 7
    WINDOW_ROW = 8
    WINDOW_COLUMN = 9
    JITTERED = 10
    JITTER_ORDER = 11
    BRIGHTNESS = 12
    CONTRAST = 13
    SATURATION = 14
    HUE = 15
    GRAY = 16
    NOISY = 17
    NOISE = 18


def random_flips(keys: Tensor, probability: float) -> Tensor:
    """Return which images, ``(B,)`` bool, are mirrored, from their ``keys``, ``(B,)`` int64."""
    return hashed_uniform(keys, Draw.FLIP) < probability


def random_pad_corners(keys: Tensor, pad: int) -> Tensor:
    """Return ``(B, 2)`` int64 in 0..2 * pad, the ``corner`` of :func:`padded_window`, from ``keys``, ``(B,)`` int64."""
    drawn = hashed_uniform(keys[:, None], Draw.PAD_CORNER, torch.arange(2, device=keys.device))
    return (drawn * (2 * pad + 1)).long()


def random_boxes(sizes: Tensor, scale: tuple[float, float], ratio: tuple[float, float], keys: Tensor) -> Tensor:
    """Draw one crop an image as torchvision's ``RandomResizedCrop.get_params`` does.

    Ten tries of a uniform area and a log-uniform ratio; where none fits, the largest centred crop within
    the ratios.

    Args:
        sizes: ``(B, 2)`` integer heights and widths, on the keys' device.
        scale: range of the share of the image's area.
        ratio: range of width over height.
        keys: ``(B,)`` int64, what an image's crop is hashed from.

    Returns:
        ``(B, 4)`` int64: top, left, height, width.
    """

    def uniform(low: float, high: float, draw: Draw, count: int) -> Tensor:
        drawn = hashed_uniform(keys[:, None], draw, torch.arange(count, device=keys.device))
        return low + (high - low) * drawn.double()

    height, width = sizes.to(torch.float64).unbind(1)
    area = (height * width)[:, None] * uniform(*scale, Draw.CROP_AREA, TRIES)
    shape = torch.exp(uniform(math.log(ratio[0]), math.log(ratio[1]), Draw.CROP_RATIO, TRIES))
    tried = torch.stack(((area / shape).sqrt().round(), (area * shape).sqrt().round()), 2)
    fits = ((tried >= 1) & (tried <= sizes[:, None])).all(2)
    first = fits.to(torch.uint8).argmax(1)
    fallback = torch.stack(
        (torch.minimum(height, (width / ratio[0]).round()), torch.minimum(width, (height * ratio[1]).round())), 1
    )
    crop = torch.where(fits.any(1)[:, None], tried[torch.arange(len(sizes)), first], fallback).long()
    room = sizes.long() - crop
    corner = torch.minimum((uniform(0, 1, Draw.CROP_CORNER, 2) * (room + 1)).long(), room)
    corner = torch.where(fits.any(1)[:, None], corner, room // 2)
    return torch.cat((corner, crop), 1)


def centre_boxes(sizes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the largest centred crops with the aspect of ``shape`` (height, width), to whole pixels.

    ``(B, 2)`` heights and widths give ``(B, 4)`` int64 top, left, height, width.
    """
    target = torch.tensor(shape, device=sizes.device, dtype=torch.float64)
    factor = (sizes / target).amin(1, keepdim=True)
    crop = (target * factor).round().long().clamp(min=1)
    return torch.cat(((sizes.long() - crop) // 2, crop), 1)


def padded_window(corner: Tensor, flip: Tensor, shape: tuple[int, int], pad: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return which rows and columns of an image a window of its padded copy shows.

    The window is that of torchvision's ``RandomCrop(shape, padding=pad, padding_mode=mode)`` of an image of ``shape``
    pixels, mirrored afterwards where ``flip`` is set, read from the image that is mirrored already.

    Args:
        corner: ``(B, 2)`` int64, 0..2 * pad, the window's top left corner in the padded image.
        flip: ``(B,)`` bool, which images are mirrored left to right.
        shape: height and width of the image and of the window.
        pad: pixels added on each side.
        mode: ``constant`` for black pixels, ``reflect`` for the image mirrored at its edge, the edge not repeated.

    Returns:
        ``(B, height)`` and ``(B, width)`` int64; -1 for black.
    """
    left = torch.where(flip, 2 * pad - corner[:, 1], corner[:, 1])
    axes = []
    for start, length in zip((corner[:, 0], left), shape, strict=True):
        index = start[:, None] - pad + torch.arange(length, device=start.device)
        if mode == "reflect":
            index = (length - 1 - (index.abs() - (length - 1)).abs()) if length > 1 else torch.zeros_like(index)
        axes.append(index.masked_fill((index < 0) | (index >= length), -1))
    return axes[0], axes[1]


def triangle_weights(centre: Tensor, step: Tensor, first: Tensor, end: Tensor, source: int) -> Tensor:
    """Weights that resample an axis by an antialiased triangle filter.

    The filter is torch's ``interpolate(mode="bilinear", antialias=True)``: a triangle around the output
    pixel's centre whose half width is one output pixel, but at least one input pixel.

    Args:
        centre: ``(B, T)`` where the centre of each of the T output pixels lies among the input pixels.
        step: input pixels an output pixel; it and the next two broadcast with ``centre``.
        first, end: input pixels that take part, ``end`` excluded.
        source: pixels of the input axis.

    Returns:
        ``(B, T, source)`` float32; rows sum to 1 and are 0 outside the stretch.
    """
    pixel = torch.arange(source, device=centre.device) + 0.5
    centre, step, first, end = (x[..., None] for x in (centre, step, first, end))
    weights = ((pixel - centre).abs_() / step.clamp(min=1)).neg_().add_(1).clamp_(min=0)
    weights.mul_((pixel > first) & (pixel < end))
    return weights.div_(weights.sum(2, keepdim=True))


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, source: int, target: int) -> Tensor:
    """Weights that resize one stretch of an axis.

    Args:
        start, length: ``(B,)`` first pixel and number of pixels of the stretch.
        flip: ``(B,)`` bool, mirror the result.
        source, target: pixels of the axis before and after.

    Returns:
        ``(B, target, source)``, see :func:`triangle_weights`.
    """
    start, length = (x.to(torch.float32)[:, None] for x in (start, length))
    output = torch.arange(target, device=start.device).expand(len(flip), -1)
    output = torch.where(flip[:, None], target - 1 - output, output) + 0.5
    step = length / target
    return triangle_weights(start + output * step, step, start, start + length, source)


def mega_weights(cuts: Tensor, source: int, target: int) -> Tensor:
    """Weights that resize each of the bands of an axis, side by side, to one width.

    Args:
        cuts: ``(B, bands + 1)`` int64, where bands begin and end, from 0 to ``source``.
        source, target: pixels of the axis before and after; where ``target`` is no multiple of the bands, their ends
            are rounded to whole pixels.

    Returns:
        ``(B, target, source)``, see :func:`triangle_weights`.
    """
    bands = cuts.shape[1] - 1
    edges = (torch.arange(bands + 1, device=cuts.device) * target / bands).round()
    output = torch.arange(target, device=cuts.device) + 0.5
    band = torch.bucketize(output, edges) - 1
    first, end = cuts[:, band].float(), cuts[:, band + 1].float()
    step = (end - first) / (edges[band + 1] - edges[band])
    return triangle_weights(first + (output - edges[band]) * step, step, first, end, source)


def resample(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    crop: tuple[int, int],
    cuts: tuple[Tensor, Tensor] | None = None,
    shape: tuple[int, int] | None = None,
    window: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Crop, resize (antialiased), mirror, shift and cut: ``(B, C, H, W)`` uint8 to ``(C, B, h, w)`` float32 in 0..1.

    Args:
        images: ``(B, C, H, W)`` uint8.
        boxes: ``(B, 4)`` int64 top, left, height, width, on any device.
        flip: ``(B,)`` bool, mirror left and right.
        crop: height and width that a box is resized to.
        cuts: where the bands of the crop begin and end along each axis, ``(B, bands + 1)`` int64 pixels; None for no
            mega-patches.
        shape: height and width of the result; None for those of the crop.
        window: the rows and columns of the crop that are shown in its place (:func:`padded_window`); None for all.
    """
    shape = shape or crop
    if images.device.type == "cpu" and images.shape[2] * images.shape[3] >= LARGE:
        view = _resize_one_by_one(images, boxes, flip, crop)
        if window is not None:
            view = _rows(_rows(view, window[0]).mT, window[1]).mT
        if cuts is None:
            return view
        along_y, along_x = mega_weights(cuts[0], crop[0], shape[0]), mega_weights(cuts[1], crop[1], shape[1])
        return torch.stack([torch.bmm(along_y, torch.bmm(plane, along_x.mT)) for plane in view])

    # Only the rectangle around the boxes takes part in the products.
    top, left = boxes[:, :2].amin(0).tolist()
    bottom, right = (boxes[:, :2] + boxes[:, 2:]).amax(0).tolist()
    boxes, flip = boxes.to(images.device), flip.to(images.device)
    pixels = images[:, :, top:bottom, left:right]
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    batch, channels, height, width = pixels.shape
    along_y = resize_weights(boxes[:, 0] - top, boxes[:, 2], torch.zeros_like(flip), height, crop[0])
    along_x = resize_weights(boxes[:, 1] - left, boxes[:, 3], flip, width, crop[1])
    if window is not None:
        along_y, along_x = (_rows(w, index.to(w.device)) for w, index in zip((along_y, along_x), window, strict=True))
    if cuts is not None:  # resampling what was resampled is one product of weights
        cut_y, cut_x = (x.to(images.device) for x in cuts)
        along_y = torch.bmm(mega_weights(cut_y, crop[0], shape[0]), along_y)
        along_x = torch.bmm(mega_weights(cut_x, crop[1], shape[1]), along_x)
    along_x.div_(255)

    view = pixels.new_empty(channels, batch, *shape)
    rows = torch.bmm(pixels.view(batch, channels * height, width), along_x.mT).view(batch, channels, height, shape[1])
    for channel in range(channels):
        torch.bmm(along_y, rows[:, channel], out=view[channel])
    return view


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Select rows of ``(..., B, h, w)`` by ``index`` ``(B, rows)``, zeros where it is -1: ``(..., B, rows, w)``."""
    each = torch.arange(len(index), device=x.device)[:, None]
    return x[..., each, index.clamp(min=0), :] * (index >= 0)[..., None]


def _resize_one_by_one(images: Tensor, boxes: Tensor, flip: Tensor, crop: tuple[int, int]) -> Tensor:
    """Crop, resize and mirror by torch's own kernel, which skips the zeros among the weights."""
    view = torch.empty(images.shape[1], len(images), *crop)
    for b, (top, left, height, width) in enumerate(boxes.tolist()):
        window = images[b : b + 1, :, top : top + height, left : left + width].float()
        view[:, b] = F.interpolate(window, crop, mode="bilinear", antialias=True)[0]
    view[:, flip] = view[:, flip].flip(3)
    return view.div_(255)
