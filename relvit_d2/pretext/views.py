"""Batched training and evaluation views of uint8 images, computed on the images' device.

A view is a crop, optionally cut into mega-patches, whose patches are cropped, colour-jittered and permuted separately.
Crop and mega-patches are one resampling by two batched matrix products. The patches are then gathered twice: sorted for
the colour jitter (color.py), and in the order of the permuted view.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from relvit_d2.pretext.color import HUE, ORDERS, SATURATION, add_noise_, color_jitter_, grayscale_
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.resampling import (
    Draw,
    centre_boxes,
    padded_window,
    random_boxes,
    random_flips,
    random_pad_corners,
    resample,
    resize_weights,
)
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.hashing import hashed_uniform, hashed_words

# Pixels of the views computed in one pass on a CPU, so that they fit into its cache.
CPU_PASS_PIXELS = 2**18

CROPS = ("resized", "pad")
PAD_MODES = ("constant", "reflect")


@dataclass(frozen=True)
class MegaPatches:
    """Settings of mega-patches: an image is cut at random lines and every piece is resized to the same size.

    Source: authors' code, transforms.py:319-353. It uses the row cuts for the columns too (transforms.py:344), which
    contradicts the paper; here the axes have separate cuts by default.

    Attributes:
        bands: number of pieces along each axis.
        unit: cuts lie on multiples of this many pixels; None: the patch size.
        keep_size: True: the view keeps its size, and pieces and patches differ; False: every piece becomes one patch.
        shared_cuts: use the row cuts for the columns too.
    """

    bands: int
    unit: int | None = None
    keep_size: bool = False
    shared_cuts: bool = False


@dataclass(frozen=True)
class ViewConfig:
    """Settings of views. Defaults are the authors' (patch_transforms.py:98-145) and torchvision's.

    Attributes:
        size: pixels of a crop, one number for a square or ``(height, width)``; multiples of ``patch_size``.
        patch_size: side of a patch in pixels.
        mega: mega-patches; None: none.
        crop_kind: training crop: ``resized`` (random resized crop) or ``pad`` (largest centred crop with the view's
            aspect ratio, resized, padded, and randomly cropped to the view's size).
        pad, pad_mode: for ``pad``: pixels added on each side, and ``constant`` (black) or ``reflect``.
        crop_scale, crop_ratio: for ``resized``: ranges of the fraction of the image area and of width / height.
        flip: probability of a horizontal flip.
        patch_crop: a random window of round(patch_size / patch_crop) pixels of each patch is resized to the patch;
            None: no crop.
        jitter: ranges of brightness, contrast, saturation (factors 1 +- x) and hue (+- x turns, 0..0.5).
        jitter_prob, gray_prob, noise_prob: probabilities of jitter, gray and noise per patch, applied in this order.
        noise_std: standard deviation of the normal noise, pixel values in 0..1; the result is clamped.
        permute: put the patches of each view in a random order.
        mean, std: normalisation of each channel, values in 0..1, applied last. If there are not three channels,
            saturation, hue and gray have no effect.

    Raises:
        UserError: a value is unknown or out of range, or sizes do not divide.
    """

    size: int | tuple[int, int]
    patch_size: int
    mega: MegaPatches | None = None
    crop_kind: str = "resized"
    pad: int = 4
    pad_mode: str = "constant"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    patch_crop: float | None = 1.15
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    noise_prob: float = 0.0
    noise_std: float = 0.1
    permute: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        height, width = self.crop
        for key, value, known in (("CROP", self.crop_kind, CROPS), ("PAD_MODE", self.pad_mode, PAD_MODES)):
            if value not in known:
                raise UserError(f"PRETEXT.{key} '{value}' is unknown; give {' or '.join(known)}")
        if not 0 <= self.pad < min(height, width):
            raise UserError(
                f"PRETEXT.PAD {self.pad} is out of range; give 0 to {min(height, width) - 1}, less than the view's side"
            )
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"a view of {height}x{width} pixels is not a multiple of the patch size: "
                f"choose a multiple of {self.patch_size} for both sides"
            )
        if (self.patch_crop is not None and self.patch_crop < 1) or self.window < 1:
            raise UserError(
                f"patch_crop {self.patch_crop} is out of range for patches of {self.patch_size} pixels: "
                f"choose 1 (whole patches) to {self.patch_size}"
            )
        if self.mega is not None:
            unit = self.cut_unit
            if height % unit or width % unit:
                raise UserError(f"mega-patches cut at multiples of {unit} pixels do not fit a crop of {height}x{width}")
            if not 1 <= self.mega.bands <= min(height, width) // unit:
                raise UserError(
                    f"{self.mega.bands} mega-patches per axis do not fit a crop of {height}x{width} pixels cut at "
                    f"multiples of {unit}: choose 1 to {min(height, width) // unit}"
                )
            if self.mega.shared_cuts and height != width:
                raise UserError(f"shared cuts need a square crop, not {height}x{width}: use separate cuts for the axes")

    def plain(self) -> "ViewConfig":
        """Return the settings without mega-patches and permutation."""
        return replace(self, mega=None, permute=False)

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of the crop in pixels, before mega-patches."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def cut_unit(self) -> int:
        """Pixels of which cuts are multiples."""
        return (self.mega and self.mega.unit) or self.patch_size

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a view in pixels."""
        if self.mega is None or self.mega.keep_size:
            return self.crop
        return (self.mega.bands * self.patch_size,) * 2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a view."""
        return self.shape[0] // self.patch_size, self.shape[1] // self.patch_size

    @property
    def augments_patches(self) -> bool:
        """Whether the pixels of patches are changed."""
        return self.window != self.patch_size or max(self.jitter_prob, self.gray_prob, self.noise_prob) > 0

    @property
    def window(self) -> int:
        """Side in pixels of the window that is cropped from a patch."""
        return self.patch_size if self.patch_crop is None else round(self.patch_size / self.patch_crop)


class PatchDraws(NamedTuple):
    """Random draws of the N patches of B images in row-major order.

    Attributes:
        offset: ``(B, N, 2)`` int64, row and column of the window inside its patch.
        order: ``(B, N)`` int64, index into ``color.ORDERS``.
        factors: ``(B, N, 4)`` brightness, contrast and saturation factors, and the hue rotation.
        jittered, gray, noisy: ``(B, N)`` bool.
        noise: ``(B, N)`` int64 seeds of the noise.
        slot: ``(B, N)`` int64, index of the patch that is moved to each slot of the view.
    """

    offset: Tensor
    order: Tensor
    factors: Tensor
    jittered: Tensor
    gray: Tensor
    noisy: Tensor
    noise: Tensor
    slot: Tensor


class Views:
    """Computes views of uint8 batches; stateless."""

    def __init__(self, config: ViewConfig) -> None:
        self.config = config

    @torch.no_grad()
    def train(self, images: Tensor, sizes: Tensor, keys: Tensor) -> tuple[Tensor, PatchLayout]:
        """Compute a random view of each image.

        A view depends on image and key only, up to rounding. Does not synchronise with the GPU.

        Args:
            images: ``(B, C, H, W)`` uint8 with as many channels as ``mean``; pixels outside an image are ignored.
            sizes: ``(B, 2)`` integer heights and widths of the images in the batch.
            keys: ``(B,)`` int64 (:func:`relvit_d2.utils.randomness.image_keys`).

        Returns:
            ``(B, C, h, w)`` float32 normalised views and the layout of their patches.
        """
        config, sizes, keys = self.config, sizes.cpu(), keys.cpu()
        flip, window = random_flips(keys, config.flip), None
        if config.crop_kind == "pad":
            boxes = centre_boxes(sizes, config.crop)
            corner = random_pad_corners(keys, config.pad)
            window = padded_window(corner, flip, config.crop, config.pad, config.pad_mode)
        else:
            boxes = random_boxes(sizes, config.crop_scale, config.crop_ratio, keys)
        draws = None
        if config.augments_patches or config.permute:
            draws = draw_patches(config, keys, images.device)
        pixels = self._render(images, boxes, flip, draw_cuts(config, keys), draws, window)
        return pixels, self._layout(images, draws and draws.slot)

    @torch.no_grad()
    def evaluate(self, images: Tensor, sizes: Tensor, keys: Tensor) -> tuple[Tensor, PatchLayout]:
        """Compute the evaluation view of each image: the largest centred crop, with mega-patches and permutation.

        Patches are not augmented. Arguments and result are those of :meth:`train`.
        """
        config, keys = self.config, keys.cpu()
        boxes = centre_boxes(sizes, config.crop)
        flip = torch.zeros(len(images), dtype=torch.bool, device=boxes.device)
        pixels = self._render(images, boxes, flip, draw_cuts(config, keys), None)
        slot = draw_slots(config, keys.to(images.device, non_blocking=True))
        if config.permute:
            pixels = permute_patches(pixels, config.patch_size, slot)
        return pixels, self._layout(images, slot)

    def _layout(self, images: Tensor, slot: Tensor | None) -> PatchLayout:
        layout = PatchLayout.full(len(images), self.config.grid, images.device)
        return layout.selected(slot) if slot is not None and self.config.permute else layout

    def _render(
        self,
        images: Tensor,
        boxes: Tensor,
        flip: Tensor,
        cuts: tuple[Tensor, Tensor] | None,
        draws: PatchDraws | None,
        window: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        config, device = self.config, images.device
        mean, std = (torch.tensor(x).to(device, non_blocking=True).view(-1, 1, 1, 1) for x in (config.mean, config.std))
        out = torch.empty(len(images), images.shape[1], *config.shape, device=device)
        for part in self._passes(images):
            # bfloat16 products would be less precise than eight-bit images.
            with torch.autocast(device.type, enabled=False):
                part_cuts, part_window = (x and (x[0][part], x[1][part]) for x in (cuts, window))
                where = boxes[part], flip[part], config.crop
                view = resample(images[part], *where, part_cuts, config.shape, part_window)
                if draws is not None:
                    view = augment_patches(view, config, PatchDraws(*(x[part] for x in draws)))
            # Normalise and transpose to (B, C, h, w) in one pass.
            torch.addcmul(-mean / std, view, 1 / std, out=out[part].transpose(0, 1))
        return out

    def _passes(self, images: Tensor) -> Iterator[slice]:
        height, width = self.config.shape
        cpu = images.device.type == "cpu"
        step = max(1, CPU_PASS_PIXELS // (height * width)) if cpu else len(images)
        return (slice(i, min(i + step, len(images))) for i in range(0, len(images), step))


def draw_cuts(config: ViewConfig, keys: Tensor) -> tuple[Tensor, Tensor] | None:
    """Draw the limits of the mega-patches along each axis, uniformly over all choices, from ``keys``, ``(B,)`` int64.

    Returns:
        Rows and columns, ``(B, bands + 1)`` int64 pixels of the crop; None without mega-patches.
    """
    if config.mega is None:
        return None
    cuts = []
    for draw, length in zip((Draw.ROW_CUTS, Draw.COLUMN_CUTS), config.crop, strict=True):
        draw = Draw.ROW_CUTS if config.mega.shared_cuts else draw
        lines = torch.arange(length // config.cut_unit - 1, device=keys.device)
        numbers = hashed_words(keys[:, None], draw, lines)
        chosen = numbers.argsort(1)[:, : config.mega.bands - 1].sort(1).values + 1
        ends = chosen.new_tensor([0, length]).expand(len(chosen), 2)
        cuts.append(torch.cat((ends[:, :1], chosen * config.cut_unit, ends[:, 1:]), 1))
    return cuts[0], cuts[1]


def draw_slots(config: ViewConfig, keys: Tensor) -> Tensor:
    """Draw ``slot`` of :class:`PatchDraws` from ``keys``, ``(B,)`` int64."""
    patches = torch.arange(config.grid[0] * config.grid[1], device=keys.device)
    if not config.permute:
        return patches.expand(len(keys), -1)
    return hashed_words(keys[:, None], Draw.SLOT, patches).argsort(1)


def draw_patches(config: ViewConfig, keys: Tensor, device: torch.device | None = None) -> PatchDraws:
    """Draw the augmentation of all patches.

    Args:
        config: ranges and probabilities.
        keys: ``(B,)`` int64, on the CPU to avoid a synchronisation: ``jittered``, ``order`` and ``noisy`` stay there.
        device: device of the other draws; None: that of the keys.
    """
    patches = torch.arange(config.grid[0] * config.grid[1])

    def uniform(keys: Tensor, *draws: Draw) -> Tensor:
        kinds, numbers = (x.to(keys.device, non_blocking=True) for x in (torch.tensor(draws)[:, None, None], patches))
        return hashed_uniform(keys[:, None], kinds, numbers)

    jittered, order, noisy = uniform(keys, Draw.JITTERED, Draw.JITTER_ORDER, Draw.NOISY)
    keys = keys.to(device or keys.device, non_blocking=True)
    factors = Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE
    drawn = uniform(keys, *factors, Draw.WINDOW_ROW, Draw.WINDOW_COLUMN, Draw.GRAY)
    ranges = torch.tensor((config.jitter, (1.0, 1.0, 1.0, 0.0)))
    spread, middle = ranges[:, :, None, None].to(keys.device, non_blocking=True)
    # Factors are not negative; the hue rotates in both directions.
    low = torch.maximum(middle - spread, middle - 1)
    return PatchDraws(
        offset=(drawn[4:6] * (config.patch_size - config.window + 1)).long().movedim(0, 2),
        order=(order * len(ORDERS)).long(),
        factors=torch.lerp(low, middle + spread, drawn[:4]).movedim(0, 2),
        jittered=jittered < config.jitter_prob,
        gray=drawn[6] < config.gray_prob,
        noisy=noisy < config.noise_prob,
        noise=hashed_words(keys[:, None], Draw.NOISE, patches.to(keys.device, non_blocking=True)),
        slot=draw_slots(config, keys),
    )


def augment_patches(view: Tensor, config: ViewConfig, draws: PatchDraws) -> Tensor:
    """Crop, resize and jitter each patch separately, then permute the patches.

    Args:
        view: ``(C, B, h, w)`` float32 in 0..1.
        config: settings of the views.
        draws: draws of the B images, on any device.

    Returns:
        A new ``(C, B, h, w)`` tensor in 0..1.
    """
    device, patch, window, channels = view.device, config.patch_size, config.window, len(view)
    batch, (rows, cols), width = view.shape[1], config.grid, config.shape[1]
    count = batch * rows * cols

    # Patches are sorted by the step of their hue rotation, so that a group shares every kernel. Group sizes and noisy
    # patches are read on the device of the order, to avoid a synchronisation.
    operations = torch.tensor(ORDERS, device=draws.order.device)[draws.order.flatten()]
    hue_step = (operations == HUE).to(torch.uint8).argmax(1).masked_fill_(~draws.jittered.flatten(), 4)
    sort = hue_step.argsort()
    groups = hue_step.bincount(minlength=5)[:4].tolist()
    noisy = draws.noisy.flatten()[sort].nonzero()[:, 0] if config.noise_prob else sort[:0]
    operations, noisy, sort = (x.to(device, non_blocking=True) for x in (operations[sort], noisy, sort))
    offset, factors = (x.flatten(0, 1).to(device, non_blocking=True)[sort] for x in (draws.offset, draws.factors))
    gray = draws.gray.flatten().to(device, non_blocking=True)[sort]
    if channels != 3:
        factors[:, SATURATION] = 1

    corner = (sort // cols * width + sort % cols) * patch + offset[:, 0] * width + offset[:, 1]
    index = _square(window, width)[:, None].to(device, non_blocking=True) + corner
    pixels = view.flatten(1).index_select(1, index.flatten())
    if window != patch:
        whole = torch.full((1,), window, device=device)
        weights = resize_weights(whole - window, whole, whole < 0, window, patch)
        pixels = torch.bmm(weights.expand(channels, -1, -1), pixels.view(channels, window, -1))
        pixels = torch.bmm(weights.expand(channels * patch, -1, -1), pixels.view(channels * patch, window, -1))
    pixels = pixels.view(channels, patch * patch, count)
    if config.jitter_prob:
        color_jitter_(pixels, factors.T.contiguous(), operations.T.contiguous(), groups)
    if config.gray_prob and channels == 3:
        grayscale_(pixels, gray)
    if config.noise_prob:
        add_noise_(pixels, noisy, draws.noise.flatten().to(device, non_blocking=True)[sort], config.noise_std)

    # Each slot of the view gathers the column of its patch.
    column = torch.empty_like(sort).scatter_(0, sort, torch.arange(count, device=device))
    column = column.view(batch, -1).gather(1, draws.slot.to(device, non_blocking=True)).view(batch, rows, 1, cols, 1)
    index = column + _square(patch, patch).to(device, non_blocking=True).view(patch, 1, patch) * count
    return pixels.flatten(1).index_select(1, index.flatten()).view_as(view)


def permute_patches(views: Tensor, patch: int, slot: Tensor) -> Tensor:
    """Move patch ``slot[b, i]`` of ``(B, C, h, w)`` views to slot i, in row-major order; returns a new tensor."""
    batch, channels, height, width = views.shape
    apart = views.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
    patches = apart.flatten(1, 2)
    moved = patches[torch.arange(batch, device=views.device)[:, None], slot].view_as(apart)
    return moved.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def _square(side: int, stride: int) -> Tensor:
    """Return the offsets of a square's pixels in a plane whose rows are ``stride`` apart, in row-major order."""
    step = torch.arange(side)
    return (step[:, None] * stride + step).flatten()
