"""Batched colour operations with separate factors for each patch.

Pixels have shape ``(C, L, P)``: C channels, L pixels of a patch and P patches innermost, so that the factors of the
patches are contiguous in memory. Values are in 0..1. Every function works in place and equals the function of
``torchvision.transforms.functional`` for float tensors on each patch, up to rounding.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from relvit_d2.utils.hashing import hashed_uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(itertools.permutations(range(4)))
"""The 24 orders of the four operations."""

# ITU-R 601 luma as torchvision rounds it (torchvision/transforms/_functional_tensor.py, rgb_to_grayscale).
LUMA = (0.2989, 0.587, 0.114)


def _luma(pixels: Tensor) -> Tensor:
    if len(pixels) != 3:
        return pixels.mean(0)
    red, green, blue = pixels
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def grayscale_(pixels: Tensor, chosen: Tensor) -> Tensor:
    """Convert the patches ``chosen``, ``(P,)`` bool, to gray; the others are unchanged."""
    return torch.lerp(pixels, _luma(pixels), chosen.to(pixels.dtype), out=pixels)


def blend_(pixels: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Blend each patch with black, its mean gray value or its gray image, then clamp to 0..1.

    Args:
        pixels: ``(C, L, P)``.
        operation: ``(P,)`` integer: BRIGHTNESS (black), CONTRAST (mean gray value) or SATURATION (gray image).
        factor: ``(P,)`` weight of the patch, 0 or more; 1 keeps it unchanged.
    """
    gray = _luma(pixels)
    mean = gray.mean(0).mul_(operation == CONTRAST)
    anchor = gray.mul_(operation == SATURATION).add_(mean)
    return torch.lerp(anchor, pixels, factor, out=pixels).clamp_(0, 1)


def hue_(pixels: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue of each patch by ``turn``, ``(P,)`` in -0.5..0.5 of the colour circle.

    Value and chroma c are kept. Hue h is measured along the colour hexagon in sixths of a turn from red: for
    green >= blue, h = (c + (g - r) + max(b - r, 0)) / c; the other half is its mirror image. A channel centred at s
    becomes ``min + c * clamp(2 - distance(h, s), 0, 1)``. These are the HSV formulas (A. R. Smith, Color gamut
    transform pairs, SIGGRAPH 1978) without case distinctions.
    """
    red, green, blue = pixels
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    top, bottom = torch.maximum(red, high), torch.minimum(red, low)
    chroma = top - bottom
    hue = low.sub_(red).clamp_(min=0).add_(high).sub_(red).add_(chroma)
    # Without chroma the numerator is 0, and so is the hue.
    hue.div_(chroma.clamp(min=torch.finfo(pixels.dtype).tiny)).copysign_(green - blue)
    hue.add_(turn, alpha=6)
    hue.sub_(torch.floor(hue / 6), alpha=6)

    reversed_base = torch.add(bottom, chroma, alpha=2)
    # Red's distance wraps round at hue 0 = 6, so it is measured from cyan at 3, on the opposite side.
    for plane, centre, base, sign in (
        (red, 3, bottom - chroma, 1),
        (green, 2, reversed_base, -1),
        (blue, 4, reversed_base, -1),
    ):
        distance = (hue - centre).abs_()
        torch.addcmul(base, chroma, distance, value=sign, out=plane)
        torch.clamp(plane, bottom, top, out=plane)
    return pixels


def color_jitter_(pixels: Tensor, factors: Tensor, order: Tensor, groups: Sequence[int]) -> Tensor:
    """Apply the four operations to each patch in a separate order.

    Patches are sorted by the step of the hue rotation. The other three operations share a formula, so every step is one
    call for a whole group. Images that do not have three channels skip the hue rotation.

    Args:
        pixels: ``(C, L, P)``: ``groups[0]`` patches with the hue first, then those with the hue second, third and
            last; the remaining patches are unchanged.
        factors: ``(4, P)`` by operation: factors of brightness, contrast and saturation, and the hue rotation.
        order: ``(4, P)`` int64, the operation of each step.
        groups: sizes of the four groups.
    """
    start = 0
    for hue_step, size in enumerate(groups):
        group = slice(start, start + size)
        start += size
        if not size:
            continue
        patches, step_factors = pixels[..., group], factors[:, group].gather(0, order[:, group])
        for step in range(4):
            if step == hue_step:
                if len(pixels) == 3:
                    hue_(patches, step_factors[step])
            else:
                blend_(patches, order[step, group], step_factors[step])
    return pixels


def add_noise_(pixels: Tensor, chosen: Tensor, seed: Tensor, std: float) -> Tensor:
    """Add normal noise to the patches ``chosen`` and clamp them to 0..1; the others are unchanged.

    Args:
        pixels: ``(C, L, P)``.
        chosen: indices of patches, ``(n,)`` int64.
        seed: ``(P,)`` int64, hashed with the pixel's index for each patch.
        std: standard deviation.
    """
    index = torch.arange(pixels[..., 0].numel(), device=pixels.device).view(len(pixels), -1, 1)
    noisy = pixels[..., chosen]
    # Box-Muller transform; the logarithm's argument is never 0.
    radius, turn = hashed_uniform(seed[chosen], 0, index), hashed_uniform(seed[chosen], 1, index)
    noise = (1 - radius).log_().mul_(-2).sqrt_().mul_(torch.cos(turn.mul_(2 * math.pi)))
    pixels[..., chosen] = noisy.add_(noise, alpha=std).clamp_(0, 1)
    return pixels
