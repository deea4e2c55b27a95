"""Baselines of the benchmarks: augmentation of one patch at a time with torchvision."""

import math

import torch
import torchvision.transforms.functional as F
from torch import Tensor, nn

from relvit_d2.pretext.color import BRIGHTNESS, CONTRAST, HUE, ORDERS, SATURATION, add_noise_
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.pair_loss import Bearing, PairKind, Relation
from relvit_d2.pretext.targets import all_pairs
from relvit_d2.pretext.views import PatchDraws, ViewConfig
from relvit_d2.utils.hashing import hashed_uniform

ADJUST = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}


def plain_view(image: Tensor, box: list[int], flip: bool, config: ViewConfig) -> Tensor:
    """Crop, resize and flip a uint8 image ``(3, H, W)``; return float32 ``(3, h, w)`` in 0..1."""
    top, left, height, width = box
    crop = F.resized_crop(image / 255, top, left, height, width, list(config.crop), antialias=True)
    return F.hflip(crop) if flip else crop


def plain_patches(view: Tensor, config: ViewConfig, draws: PatchDraws) -> Tensor:
    """Augment the patches of a view ``(3, h, w)`` with the parameters in ``draws``, each ``(N, ...)``.

    Equal to :func:`relvit_d2.pretext.views.augment_patches`, but slower.
    """
    patch, window, (_, cols) = config.patch_size, config.window, config.grid
    result, patches = torch.empty_like(view), []
    for n in range(len(draws.gray)):
        top, left = n // cols * patch, n % cols * patch
        y, x = draws.offset[n].tolist()
        one = view[:, top + y : top + y + window, left + x : left + x + window]
        if window != patch:
            one = F.resize(one, [patch, patch], antialias=True)
        if draws.jittered[n]:
            for operation in ORDERS[draws.order[n]]:
                one = ADJUST[operation](one, draws.factors[n, operation].item())
        if draws.gray[n]:
            one = F.rgb_to_grayscale(one, 3)
        if draws.noisy[n]:
            one = (one + config.noise_std * _noise(draws.noise[n], patch)).clamp(0, 1)
        patches.append(one)
    for slot, n in enumerate(draws.slot.tolist()):
        top, left = slot // cols * patch, slot % cols * patch
        result[:, top : top + patch, left : left + patch] = patches[n]
    return result


def _noise(seed: Tensor, patch: int) -> Tensor:
    """Return the noise of a patch, measured by adding it to gray, where it is not clamped."""
    gray = torch.full((3, patch * patch, 1), 0.5)
    return (add_noise_(gray, torch.tensor([0]), seed[None], 1e-3).view(3, patch, patch) - 0.5) * 1e3


def pair_loss_plain(
    q: Tensor, k: Tensor, layout: PatchLayout, kind: PairKind, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Same as :func:`relvit_d2.pretext.pair_loss.pair_loss`, with all ``(B, maps, N, N)`` scores in memory."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    loss, measure = _plain_losses(kind, scores, all_pairs(kind.target, layout))
    pairs = layout.valid[:, :, None] & layout.valid[:, None, :]
    if not kind.same_cell:
        pairs &= (layout.row[:, :, None] != layout.row[:, None]) | (layout.col[:, :, None] != layout.col[:, None])
    kept = pairs
    if dropout:
        seed, image, index = torch.randint(2**31, ()), torch.arange(len(q)), torch.arange(q.shape[2])
        kept = pairs & (hashed_uniform(seed, image[:, None, None], index[:, None], index) >= dropout)
    return loss[kept].mean(), kind.summary(measure[pairs].to(loss.dtype).mean())


def _plain_losses(kind: PairKind, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the measure of each pair."""
    if isinstance(kind, Relation):
        loss = nn.functional.cross_entropy(scores, target, reduction="none", label_smoothing=kind.smoothing)
        return loss, scores.argmax(1) == target
    error = scores.squeeze(1) - target
    if isinstance(kind, Bearing):
        return 1 - torch.cos(error * math.pi), (error - 2 * torch.round(error / 2)).abs()
    return error.square(), error.square()
