"""Crop, resize, flip and cut uint8 images into mega-patches, by matrix products with weights along each axis."""

import math
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from relvit_d2.utils.hashing import hashed_uniform, hashed_words

TRIES = 10  # torchvision's RandomResizedCrop
# From this many pixels on a CPU resizes images one by one, since most of the weights would be zero.
LARGE = 2**14


class Draw(IntEnum):
    """Purpose of a random number of a view, which is hashed from the image's key, the purpose and a counter."""

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
    KEPT = 19


def random_flips(keys: Tensor, probability: float) -> Tensor:
    """Draw which images to flip, ``(B,)`` bool, from their ``keys``, ``(B,)`` int64."""
    return hashed_uniform(keys, Draw.FLIP) < probability


def random_tokens(keys: Tensor, tokens: int, count: int) -> Tensor:
    """Draw ``count`` of ``tokens`` indices without replacement, ascending, ``(B, count)``, from ``keys``, ``(B,)``."""
    numbers = hashed_words(keys[:, None], Draw.KEPT, torch.arange(tokens, device=keys.device))
    return numbers.argsort(1)[:, :count].sort(1).values


def random_pad_corners(keys: Tensor, pad: int) -> Tensor:
    """Draw ``corner`` of :func:`padded_window`, ``(B, 2)`` int64 in 0..2 * pad, from ``keys``, ``(B,)`` int64."""
    drawn = hashed_uniform(keys[:, None], Draw.PAD_CORNER, torch.arange(2, device=keys.device))
    return (drawn * (2 * pad + 1)).long()


def random_boxes(sizes: Tensor, scale: tuple[float, float], ratio: tuple[float, float], keys: Tensor) -> Tensor:
    """Draw a crop of each image like torchvision's ``RandomResizedCrop.get_params``.

    Ten tries of a uniform area and a log-uniform ratio; if none fits, the largest centred crop within the ratios.

    Args:
        sizes: ``(B, 2)`` integer heights and widths, on the keys' device.
        scale: range of the fraction of the image area.
        ratio: range of width / height.
        keys: ``(B,)`` int64, hashed to the random numbers.

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
    free = sizes.long() - crop
    corner = torch.minimum((uniform(0, 1, Draw.CROP_CORNER, 2) * (free + 1)).long(), free)
    corner = torch.where(fits.any(1)[:, None], corner, free // 2)
    return torch.cat((corner, crop), 1)


def centre_boxes(sizes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the largest centred crops with the aspect ratio of ``shape`` (height, width), rounded to pixels.

    Sizes are ``(B, 2)`` heights and widths; the result is ``(B, 4)`` int64 top, left, height, width.
    """
    target = torch.tensor(shape, device=sizes.device, dtype=torch.float64)
    factor = (sizes / target).amin(1, keepdim=True)
    crop = (target * factor).round().long().clamp(min=1)
    return torch.cat(((sizes.long() - crop) // 2, crop), 1)


def padded_window(corner: Tensor, flip: Tensor, shape: tuple[int, int], pad: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of an image in a window of its padded copy.

    As torchvision's ``RandomCrop(shape, padding=pad, padding_mode=mode)`` followed by a flip; the indices refer to the
    flipped image.

    Args:
        corner: ``(B, 2)`` int64 in 0..2 * pad, top left corner of the window in the padded image.
        flip: ``(B,)`` bool, images flipped horizontally.
        shape: height and width of the image and of the window.
        pad: pixels added on each side.
        mode: ``constant`` (black) or ``reflect`` (mirrored without repeating the edge).

    Returns:
        ``(B, height)`` and ``(B, width)`` int64; -1 for black pixels.
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
    """Return the weights of antialiased linear resampling along an axis.

    As torch's ``interpolate(mode="bilinear", antialias=True)``: a triangle at the centre of the output pixel whose half
    width is one output pixel, but at least one input pixel.

    Args:
        centre: ``(B, T)`` centres of the output pixels in input coordinates.
        step: input pixels per output pixel; broadcasts with ``centre``, as the next two.
        first, end: range of the input pixels used, ``end`` excluded.
        source: pixels of the input axis.

    Returns:
        ``(B, T, source)`` float32; rows sum to 1.
    """
    pixel = torch.arange(source, device=centre.device) + 0.5
    centre, step, first, end = (x[..., None] for x in (centre, step, first, end))
    weights = ((pixel - centre).abs_() / step.clamp(min=1)).neg_().add_(1).clamp_(min=0)
    weights.mul_((pixel > first) & (pixel < end))
    return weights.div_(weights.sum(2, keepdim=True))


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, source: int, target: int) -> Tensor:
    """Return the weights ``(B, target, source)`` that resize an interval of an axis.

    Args:
        start, length: ``(B,)`` first pixel and length of the interval.
        flip: ``(B,)`` bool, reverse the result.
        source, target: pixels of the axis before and after.
    """
    start, length = (x.to(torch.float32)[:, None] for x in (start, length))
    output = torch.arange(target, device=start.device).expand(len(flip), -1)
    output = torch.where(flip[:, None], target - 1 - output, output) + 0.5
    step = length / target
    return triangle_weights(start + output * step, step, start, start + length, source)


def mega_weights(cuts: Tensor, source: int, target: int) -> Tensor:
    """Return the weights ``(B, target, source)`` that resize adjacent bands of an axis to equal widths.

    Args:
        cuts: ``(B, bands + 1)`` int64 limits of the bands, from 0 to ``source``.
        source, target: pixels of the axis before and after; the limits in ``target`` are rounded to whole pixels.
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
    """Crop, resize (antialiased), flip, select rows and columns, and cut.

    Args:
        images: ``(B, C, H, W)`` uint8.
        boxes: ``(B, 4)`` int64 top, left, height, width, on any device.
        flip: ``(B,)`` bool, flip horizontally.
        crop: height and width to which a box is resized.
        cuts: limits of the mega-patches along each axis, ``(B, bands + 1)`` int64 pixels of the crop; None: none.
        shape: height and width of the result; None: ``crop``.
        window: rows and columns of the crop to select (:func:`padded_window`); None: all.

    Returns:
        ``(C, B, h, w)`` float32 in 0..1.
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

    # Only the bounding rectangle of the boxes is multiplied.
    top, left = boxes[:, :2].amin(0).tolist()
    bottom, right = (boxes[:, :2] + boxes[:, 2:]).amax(0).tolist()
    boxes, flip = (x.to(images.device, non_blocking=True) for x in (boxes, flip))
    pixels = images[:, :, top:bottom, left:right]
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    batch, channels, height, width = pixels.shape
    along_y = resize_weights(boxes[:, 0] - top, boxes[:, 2], torch.zeros_like(flip), height, crop[0])
    along_x = resize_weights(boxes[:, 1] - left, boxes[:, 3], flip, width, crop[1])
    if window is not None:
        along_y, along_x = (
            _rows(w, index.to(w.device, non_blocking=True)) for w, index in zip((along_y, along_x), window, strict=True)
        )
    if cuts is not None:  # two resamplings are one product of their weights
        cut_y, cut_x = (x.to(images.device, non_blocking=True) for x in cuts)
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
    """Crop, resize and flip with torch's kernel, which skips weights of zero."""
    view = torch.empty(images.shape[1], len(images), *crop)
    for b, (top, left, height, width) in enumerate(boxes.tolist()):
        pixels = images[b : b + 1, :, top : top + height, left : left + width].float()
        view[:, b] = F.interpolate(pixels, crop, mode="bilinear", antialias=True)[0]
    view[:, flip] = view[:, flip].flip(3)
    return view.div_(255)
