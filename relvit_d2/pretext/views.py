"""Training and evaluation views of a whole batch at once, from uint8 images, on the images' device.

A view is a resized crop whose patches are each cropped, coloured and moved on their own. Resampling is
two batched matrix products. The patches are then gathered once, with their crops and sorted for the colour
jitter (see color.py), and once more to the slots of the permuted view.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from relvit_d2.errors import UserError
from relvit_d2.pretext.color import HUE, ORDERS, color_jitter_, grayscale_
from relvit_d2.pretext.layout import PatchLayout

# Pixels of the views made in one pass on a CPU, so that the planes of a pass stay in its cache.
CPU_PASS_PIXELS = 2**18
TRIES = 10  # torchvision's RandomResizedCrop


@dataclass(frozen=True)
class ViewConfig:
    """What views look like. Defaults are the authors' (patch_transforms.py:98-145) and torchvision's.

    Attributes:
        size: pixels of a view, one number for a square or ``(height, width)``; multiples of ``patch_size``.
        patch_size: pixels of a patch's side.
        crop_scale: range of a crop's share of the image's area.
        crop_ratio: range of a crop's width over its height.
        flip: probability of a horizontal flip.
        patch_crop: each patch shows a random window of round(patch_size / patch_crop) pixels, resized to
            the patch; None leaves patches whole.
        jitter: ranges of brightness, contrast, saturation (factors 1 +- x) and hue (+- x turns, 0..0.5).
        jitter_prob, gray_prob: probability that a patch is jittered, that it is made gray.
        permute: put the patches of each view in a random order.
        mean, std: of RGB values in 0..1; taken off last, when colours are done.

    Raises:
        UserError: a size that is no multiple of the patch, or a window larger than its patch.
    """

    size: int | tuple[int, int]
    patch_size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    patch_crop: float | None = 1.15
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    permute: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        height, width = self.shape
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"a view of {height}x{width} pixels is no whole number of patches of {self.patch_size} pixels: "
                f"choose a multiple of {self.patch_size} for both sides"
            )
        if (self.patch_crop is not None and self.patch_crop < 1) or self.window < 1:
            raise UserError(
                f"patch_crop {self.patch_crop} gives no window inside patches of {self.patch_size} pixels: "
                f"choose 1 (whole patches) to {self.patch_size}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a view in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a view."""
        return self.shape[0] // self.patch_size, self.shape[1] // self.patch_size

    @property
    def augments_patches(self) -> bool:
        """Whether any patch may change its pixels."""
        return self.window != self.patch_size or self.jitter_prob > 0 or self.gray_prob > 0

    @property
    def window(self) -> int:
        """Pixels of the side of the window that a patch shows of itself."""
        return self.patch_size if self.patch_crop is None else round(self.patch_size / self.patch_crop)


class PatchDraws(NamedTuple):
    """The random choices of the N patches of B images, counted row by row.

    Attributes:
        offset: ``(B, N, 2)`` int64, row and column of the window inside its patch.
        order: ``(B, N)`` int64, index into ``color.ORDERS``.
        factors: ``(B, N, 4)`` brightness, contrast and saturation factors and the hue's turn.
        jittered, gray: ``(B, N)`` bool.
        slot: ``(B, N)`` int64, the patch that comes to lie in each slot of the view.
    """

    offset: Tensor
    order: Tensor
    factors: Tensor
    jittered: Tensor
    gray: Tensor
    slot: Tensor


class Views:
    """Makes views of uint8 batches; holds no state but its configuration."""

    def __init__(self, config: ViewConfig) -> None:
        self.config = config

    @torch.no_grad()
    def train(
        self, images: Tensor, sizes: Tensor, generator: torch.Generator, share: tuple[int, int, int] | None = None
    ) -> tuple[Tensor, PatchLayout]:
        """Make one random view of each image.

        Every choice is drawn from ``generator`` on the generator's own device and then moved: a CPU
        generator gives the same views, to rounding, on every device, and nothing is read back from the GPU.

        Args:
            images: ``(B, 3, H, W)`` uint8 RGB; what lies outside an image's own size is never looked at.
            sizes: ``(B, 2)`` integer heights and widths of the images inside the batch.
            generator: the only source of randomness.
            share: first place, end and size of a larger batch of which these images are a part: all of its choices
                are drawn, so that its parts, wherever they are computed, are together what it would be whole.

        Returns:
            ``(B, 3, h, w)`` float32 normalised views, and where their patches truly lie.
        """
        config = self.config
        first, end, whole = share or (0, len(images), len(images))
        part = slice(first, end)
        all_sizes = sizes.new_ones(whole, 2, device=generator.device)
        all_sizes[part] = sizes.to(generator.device)
        boxes = random_boxes(all_sizes, config.crop_scale, config.crop_ratio, generator)[part]
        flip = (torch.rand(whole, generator=generator, device=generator.device) < config.flip)[part]
        layout = PatchLayout.full(len(images), config.grid, images.device)
        if not (config.augments_patches or config.permute):
            return self._make(images, boxes, flip, None), layout
        draws = PatchDraws(*(x[part] for x in draw_patches(config, whole, generator)))
        if config.permute:
            layout = layout.permuted(draws.slot.to(images.device))
        return self._make(images, boxes, flip, draws), layout

    @torch.no_grad()
    def evaluate(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, PatchLayout]:
        """Make the fixed view of each image: the largest centred crop of the view's shape, resized.

        Arguments and results are those of :meth:`train`, less the randomness.
        """
        boxes = centre_boxes(sizes, self.config.shape)
        flip = torch.zeros(len(images), dtype=torch.bool, device=boxes.device)
        layout = PatchLayout.full(len(images), self.config.grid, images.device)
        return self._make(images, boxes, flip, None), layout

    def _make(self, images: Tensor, boxes: Tensor, flip: Tensor, draws: PatchDraws | None) -> Tensor:
        config, device = self.config, images.device
        mean, std = (torch.tensor(x, device=device).view(3, 1, 1, 1) for x in (config.mean, config.std))
        out = torch.empty(len(images), 3, *config.shape, device=device)
        for part in self._passes(images):
            # Autocast would round the products to bfloat16, coarser than the images' own eight bits.
            with torch.autocast(device.type, enabled=False):
                view = resample(images[part], boxes[part], flip[part], config.shape)
                if draws is not None:
                    view = augment_patches(view, config, PatchDraws(*(x[part] for x in draws)))
            # One pass normalises and puts the channels back behind the batch.
            torch.addcmul(-mean / std, view, 1 / std, out=out[part].transpose(0, 1))
        return out

    def _passes(self, images: Tensor) -> Iterator[slice]:
        height, width = self.config.shape
        cpu = images.device.type == "cpu"
        step = max(1, CPU_PASS_PIXELS // (height * width)) if cpu else len(images)
        return (slice(i, min(i + step, len(images))) for i in range(0, len(images), step))


def random_boxes(
    sizes: Tensor, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Draw one crop an image as torchvision's ``RandomResizedCrop.get_params`` does.

    Ten tries of a uniform area and a log-uniform ratio; where none fits, the largest centred crop within
    the ratios.

    Args:
        sizes: ``(B, 2)`` integer heights and widths, on the generator's device.
        scale: range of the share of the image's area.
        ratio: range of width over height.
        generator: the source of randomness.

    Returns:
        ``(B, 4)`` int64: top, left, height, width.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        draw = torch.rand(shape, generator=generator, device=sizes.device, dtype=torch.float64)
        return low + (high - low) * draw

    height, width = sizes.to(torch.float64).unbind(1)
    area = (height * width)[:, None] * uniform(*scale, len(sizes), TRIES)
    shape = torch.exp(uniform(math.log(ratio[0]), math.log(ratio[1]), len(sizes), TRIES))
    tried = torch.stack(((area / shape).sqrt().round(), (area * shape).sqrt().round()), 2)
    fits = ((tried >= 1) & (tried <= sizes[:, None])).all(2)
    first = fits.to(torch.uint8).argmax(1)
    fallback = torch.stack(
        (torch.minimum(height, (width / ratio[0]).round()), torch.minimum(width, (height * ratio[1]).round())), 1
    )
    crop = torch.where(fits.any(1)[:, None], tried[torch.arange(len(sizes)), first], fallback).long()
    room = sizes.long() - crop
    corner = torch.minimum((uniform(0, 1, len(sizes), 2) * (room + 1)).long(), room)
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


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, source: int, target: int) -> Tensor:
    """Weights that resize a stretch of an axis by an antialiased triangle filter.

    The filter is torch's ``interpolate(mode="bilinear", antialias=True)``: a triangle around the output
    pixel's centre whose half width is one output pixel, but at least one input pixel.

    Args:
        start, length: ``(B,)`` first pixel and number of pixels of the stretch.
        flip: ``(B,)`` bool, mirror the result.
        source, target: pixels of the axis before and after.

    Returns:
        ``(B, target, source)`` float32; rows sum to 1 and are 0 outside the stretch.
    """
    start, length = (x.to(torch.float32)[:, None, None] for x in (start, length))
    pixel = torch.arange(source, device=start.device) + 0.5
    output = torch.arange(target, device=start.device).expand(len(flip), -1)
    output = torch.where(flip[:, None], target - 1 - output, output)[:, :, None] + 0.5
    step = length / target
    weights = ((pixel - (start + output * step)).abs_() / step.clamp(min=1)).neg_().add_(1).clamp_(min=0)
    weights.mul_((pixel > start) & (pixel < start + length))
    return weights.div_(weights.sum(2, keepdim=True))


def resample(images: Tensor, boxes: Tensor, flip: Tensor, shape: tuple[int, int]) -> Tensor:
    """Crop, resize (antialiased) and mirror: ``(B, 3, H, W)`` uint8 to ``(3, B, h, w)`` float32 in 0..1.

    Args:
        images: ``(B, 3, H, W)`` uint8.
        boxes: ``(B, 4)`` int64 top, left, height, width, on any device.
        flip: ``(B,)`` bool, mirror left and right.
        shape: height and width of the result.
    """
    # Only the rectangle around this pass's boxes takes part in the products.
    top, left = boxes[:, :2].amin(0).tolist()
    bottom, right = (boxes[:, :2] + boxes[:, 2:]).amax(0).tolist()
    boxes, flip = boxes.to(images.device), flip.to(images.device)
    window = images[:, :, top:bottom, left:right]
    window = window.to(torch.float32, memory_format=torch.contiguous_format)
    batch, _, height, width = window.shape
    along_y = resize_weights(boxes[:, 0] - top, boxes[:, 2], torch.zeros_like(flip), height, shape[0])
    along_x = resize_weights(boxes[:, 1] - left, boxes[:, 3], flip, width, shape[1])
    along_x.div_(255)

    view = window.new_empty(3, batch, *shape)
    rows = torch.bmm(window.view(batch, 3 * height, width), along_x.mT).view(batch, 3, height, shape[1])
    for channel in range(3):
        torch.bmm(along_y, rows[:, channel], out=view[channel])
    return view


def draw_patches(config: ViewConfig, batch: int, generator: torch.Generator) -> PatchDraws:
    """Draw what happens to each patch of a batch of views, on the generator's device."""
    device, count = generator.device, config.grid[0] * config.grid[1]

    def rand(*shape: int) -> Tensor:
        return torch.rand(batch, count, *shape, generator=generator, device=device)

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (batch, count, *shape), generator=generator, device=device)

    spread = torch.tensor(config.jitter, device=device)
    middle = torch.tensor((1.0, 1.0, 1.0, 0.0), device=device)
    # A factor is never negative; the hue turns both ways.
    low = torch.maximum(middle - spread, middle - 1)
    return PatchDraws(
        offset=randint(config.patch_size - config.window + 1, 2),
        order=randint(len(ORDERS)),
        factors=torch.lerp(low, middle + spread, rand(4)),
        jittered=rand() < config.jitter_prob,
        gray=rand() < config.gray_prob,
        slot=rand().argsort(1) if config.permute else torch.arange(count, device=device).expand(batch, -1),
    )


def augment_patches(view: Tensor, config: ViewConfig, draws: PatchDraws) -> Tensor:
    """Crop, resize and colour every patch on its own, then move the patches to their slots.

    Args:
        view: ``(3, B, h, w)`` float32 in 0..1.
        config: sizes of view, patch and window; what it switches off is skipped.
        draws: the choices of these B images, on any device.

    Returns:
        A new ``(3, B, h, w)`` in 0..1.
    """
    device, patch, window = view.device, config.patch_size, config.window
    batch, (rows, cols), width = view.shape[1], config.grid, config.shape[1]
    count = batch * rows * cols

    # Sorted by the step at which the jitter turns their hue, patches fall into groups that
    # share every kernel. The sizes of the groups are read where they were drawn.
    operations = torch.tensor(ORDERS, device=draws.order.device)[draws.order.flatten()]
    hue_step = (operations == HUE).to(torch.uint8).argmax(1).masked_fill_(~draws.jittered.flatten(), 4)
    sort = hue_step.argsort()
    groups = hue_step.bincount(minlength=5)[:4].tolist()
    offset, factors, operations, gray = (
        x[sort].to(device)
        for x in (draws.offset.flatten(0, 1), draws.factors.flatten(0, 1), operations, draws.gray.flatten())
    )
    sort = sort.to(device)

    corner = (sort // cols * width + sort % cols) * patch + offset[:, 0] * width + offset[:, 1]
    pixels = view.flatten(1).index_select(1, (_square(window, width)[:, None].to(device) + corner).flatten())
    if window != patch:
        whole = torch.tensor([window], device=device)
        weights = resize_weights(whole - window, whole, whole < 0, window, patch)
        pixels = torch.bmm(weights.expand(3, -1, -1), pixels.view(3, window, -1))
        pixels = torch.bmm(weights.expand(3 * patch, -1, -1), pixels.view(3 * patch, window, -1))
    pixels = pixels.view(3, patch * patch, count)
    if config.jitter_prob:
        color_jitter_(pixels, factors.T.contiguous(), operations.T.contiguous(), groups)
    if config.gray_prob:
        grayscale_(pixels, gray)

    # Every slot of the view reads the column of the patch that it shows.
    column = torch.empty_like(sort).scatter_(0, sort, torch.arange(count, device=device))
    column = column.view(batch, -1).gather(1, draws.slot.to(device)).view(batch, rows, 1, cols, 1)
    index = column + _square(patch, patch).to(device).view(patch, 1, patch) * count
    return pixels.flatten(1).index_select(1, index.flatten()).view_as(view)


def _square(side: int, stride: int) -> Tensor:
    """Offsets of the pixels of a square, row by row, in a plane whose rows are ``stride`` apart."""
    step = torch.arange(side)
    return (step[:, None] * stride + step).flatten()
