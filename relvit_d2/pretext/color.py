"""Colour operations on many patches at once, each patch with its own factors.

Pixels are laid out ``(C, L, P)``: RGB planes, or those of other channels, the L pixels of a patch, and the P patches
innermost, so that a factor a patch runs along memory however small the patches are. Values are in 0..1. Every function
works in place and gives the values of ``torchvision.transforms.functional`` on float tensors, patch by
patch, to rounding.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from relvit_d2.utils.hashing import hashed_uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(itertools.permutations(range(4)))
"""The 24 orders in which a patch may meet the four operations."""

# ITU-R 601 luma as torchvision rounds it (torchvision/transforms/_functional_tensor.py, rgb_to_grayscale).
LUMA = (0.2989, 0.587, 0.114)


def _luma(pixels: Tensor) -> Tensor:
    if len(pixels) != 3:
        return pixels.mean(0)
    red, green, blue = pixels
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def grayscale_(pixels: Tensor, chosen: Tensor) -> Tensor:
    """Make the patches gray where ``chosen``, bool ``(P,)``; the others keep every bit."""
    return torch.lerp(pixels, _luma(pixels), chosen.to(pixels.dtype), out=pixels)


def blend_(pixels: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Scale each patch's distance from black, from its mean gray or from its own gray, then clamp to 0..1.

    Args:
        pixels: ``(C, L, P)``.
        operation: ``(P,)`` integer: BRIGHTNESS (black), CONTRAST (mean gray) or SATURATION (own gray).
        factor: ``(P,)``, 0 or more; 1 changes nothing.
    """
    gray = _luma(pixels)
    mean = gray.mean(0).mul_(operation == CONTRAST)
    anchor = gray.mul_(operation == SATURATION).add_(mean)
    return torch.lerp(anchor, pixels, factor, out=pixels).clamp_(0, 1)


def hue_(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of each patch by ``turn``, ``(P,)`` in -0.5..0.5 of the colour circle.

    Value and chroma stay. Hue is measured along the colour hexagon in sixths of a turn: with red at 0
    and, for green >= blue, h = (c + (g - r) + max(b - r, 0)) / c, c being the chroma; the other half is its
    mirror image. A channel centred at s then gets ``min + c * clamp(2 - distance(h, s), 0, 1)``, which are
    the HSV formulas (A. R. Smith, Color gamut transform pairs, SIGGRAPH 1978) free of case distinctions.
    """
    red, green, blue = pixels
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    top, bottom = torch.maximum(red, high), torch.minimum(red, low)
    chroma = top - bottom
    hue = low.sub_(red).clamp_(min=0).add_(high).sub_(red).add_(chroma)
    # A patch without chroma has hue 0; its numerator is 0 exactly.
    hue.div_(chroma.clamp(min=torch.finfo(pixels.dtype).tiny)).copysign_(green - blue)
    hue.add_(turn, alpha=6)
    hue.sub_(torch.floor(hue / 6), alpha=6)

    away = torch.add(bottom, chroma, alpha=2)
    # Red's distance wraps round at hue 0 = 6, so it is taken from the opposite side, cyan at 3.
    for plane, centre, base, sign in (
        (red, 3, bottom - chroma, 1),
        (green, 2, away, -1),
        (blue, 4, away, -1),
    ):
        distance = (hue - centre).abs_()
        torch.addcmul(base, chroma, distance, value=sign, out=plane)
        torch.clamp(plane, bottom, top, out=plane)
    return pixels


def color_jitter_(pixels: Tensor, factors: Tensor, order: Tensor, groups: Sequence[int]) -> Tensor:
    """Apply the four operations to each patch in the patch's own order.

    Patches are sorted by the step at which they meet the hue; the other three operations are one formula,
    so every step is one call for a whole group. Other channels than RGB's three have no hue: that step does nothing.

    Args:
        pixels: ``(C, L, P)``, sorted: ``groups[0]`` patches whose hue comes first, then those whose hue
            comes second, third and last; the rest is left alone.
        factors: ``(4, P)`` by operation: brightness, contrast, saturation factors and the hue's turn.
        order: ``(4, P)`` int64, the operation of each step.
        groups: four sizes.
    """
    start = 0
    for hue_step, size in enumerate(groups):
        here = slice(start, start + size)
        start += size
        if not size:
            continue
        patches, step_factors = pixels[..., here], factors[:, here].gather(0, order[:, here])
        for step in range(4):
            if step == hue_step:
                if len(pixels) == 3:
                    hue_(patches, step_factors[step])
            else:
                blend_(patches, order[step, here], step_factors[step])
    return pixels


def add_noise_(pixels: Tensor, chosen: Tensor, seed: Tensor, std: float) -> Tensor:
    """Add normal noise to the patches where ``chosen``, then clamp them to 0..1; the others keep every bit.

    Args:
        pixels: ``(C, L, P)``.
        chosen: ``(P,)`` bool.
        seed: ``(P,)`` int64, what decides a patch's noise.
        std: standard deviation.
    """
    place = torch.arange(pixels[..., 0].numel(), device=pixels.device).view(len(pixels), -1, 1)
    noisy = pixels[..., chosen]
    # Box and Muller's transform of two uniform numbers; the logarithm's argument is never 0.
    radius, turn = hashed_uniform(seed[chosen], 0, place), hashed_uniform(seed[chosen], 1, place)
    noise = (1 - radius).log_().mul_(-2).sqrt_().mul_(torch.cos(turn.mul_(2 * math.pi)))
    pixels[..., chosen] = noisy.add_(noise, alpha=std).clamp_(0, 1)
    return pixels
