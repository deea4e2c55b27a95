"""Training and evaluation views of a whole batch at once, from uint8 images, on the images' device.

A view is a resized or a padded crop, cut into mega-patches or not, whose patches are each cropped, coloured and moved
on their own. Crop and mega-patches are one resampling, two batched matrix products. The patches are then gathered once,
with their crops and sorted for the colour jitter (see color.py), and once more to the slots of the permuted view.
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

# Pixels of the views made in one pass on a CPU, so that the planes of a pass stay in its cache.
CPU_PASS_PIXELS = 2**18

CROPS = ("resized", "pad")
PAD_MODES = ("constant", "reflect")  # torchvision's names


@dataclass(frozen=True)
class MegaPatches:
    """Cuts an image at random lines and resizes each piece to one size (authors' code, transforms.py:319-353).

    The aspect of a piece is not kept. In the authors' code the columns are cut where the rows are, which is a slip
    (transforms.py:344); here each axis has cuts of its own.

    Attributes:
        bands: pieces along each axis.
        unit: pixels of the steps that cuts lie on; None for the patch.
        keep_size: the view keeps its size, so that the bands are size / bands pixels wide (to whole pixels) and its
            patches need not be the pieces; else every piece becomes one patch.
        shared_cuts: cut columns where the rows are, as the authors' code does.
    """

    bands: int
    unit: int | None = None
    keep_size: bool = False
    shared_cuts: bool = False


@dataclass(frozen=True)
class ViewConfig:
    """What views look like. Defaults are the authors' (patch_transforms.py:98-145) and torchvision's.

    Attributes:
        size: pixels of a crop, one number for a square or ``(height, width)``; multiples of ``patch_size``.
        patch_size: pixels of a patch's side.
        mega: cut the crop into mega-patches; None for a view that is the crop.
        crop_kind: in training ``resized``, a random part of the image, resized; or ``pad``, the largest centred part
            of the view's aspect, resized, padded, and a random window of the view's size of that.
        pad: pixels added on each side for ``pad``.
        pad_mode: what is added: ``constant`` black pixels, or ``reflect``, the image mirrored at its edges.
        crop_scale: range of a resized crop's share of the image's area.
        crop_ratio: range of a resized crop's width over its height.
        flip: probability of a horizontal flip.
        patch_crop: each patch shows a random window of round(patch_size / patch_crop) pixels, resized to
            the patch; None leaves patches whole.
        jitter: ranges of brightness, contrast, saturation (factors 1 +- x) and hue (+- x turns, 0..0.5).
        jitter_prob, gray_prob, noise_prob: probability that a patch is jittered, made gray, made noisy, in this order.
        noise_std: standard deviation of the normal noise, of values in 0..1; the result is clamped.
        permute: put the patches of each view in a random order.
        mean, std: of each channel's values in 0..1; taken off last, when colours are done. Three channels are RGB;
            those of any other number keep saturation, hue and gray, which are RGB's.

    Raises:
        UserError: a size that is no multiple of the patch, a window larger than its patch, cuts that do not fit, or
            a crop or padding that does not exist.
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
                f"a view of {height}x{width} pixels is no whole number of patches of {self.patch_size} pixels: "
                f"choose a multiple of {self.patch_size} for both sides"
            )
        if (self.patch_crop is not None and self.patch_crop < 1) or self.window < 1:
            raise UserError(
                f"patch_crop {self.patch_crop} gives no window inside patches of {self.patch_size} pixels: "
                f"choose 1 (whole patches) to {self.patch_size}"
            )

        if self.mega is not None:
            unit = self.cut_unit
            if height % unit or width % unit:
                raise UserError(f"mega-patches cut at multiples of {unit} pixels do not fit a crop of {height}x{width}")
            if not 1 <= self.mega.bands <= min(height, width) // unit:
                raise UserError(
                    f"{self.mega.bands} mega-patches an axis do not fit a crop of {height}x{width} pixels cut at "
                    f"multiples of {unit}: choose 1 to {min(height, width) // unit}"
                )
            if self.mega.shared_cuts and height != width:
                raise UserError(f"shared cuts need a square crop, not {height}x{width}: give each axis its own")

    def plain(self) -> "ViewConfig":
        """Return the config of views that are the crop as it is, neither cut nor permuted."""
        return replace(self, mega=None, permute=False)

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width in pixels of what a view shows, before mega-patches."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def cut_unit(self) -> int:
        """Pixels of the steps that cuts lie on."""
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
        """Whether any patch may change its pixels."""
        return self.window != self.patch_size or max(self.jitter_prob, self.gray_prob, self.noise_prob) > 0

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
        jittered, gray, noisy: ``(B, N)`` bool.
        noise: ``(B, N)`` int64, what the noise of a patch is hashed from.
        slot: ``(B, N)`` int64, the patch that comes to lie in each slot of the view.
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
    """Makes views of uint8 batches; holds no state but its configuration."""

    def __init__(self, config: ViewConfig) -> None:
        self.config = config

    @torch.no_grad()
    def train(self, images: Tensor, sizes: Tensor, keys: Tensor) -> tuple[Tensor, PatchLayout]:
        """Make one random view of each image.

        Every choice is hashed from the image's key: the view is the same, to rounding, on every device and in every
        batch that the image is part of. Nothing is read back from the GPU.

        Args:
            images: ``(B, C, H, W)`` uint8, as many channels as ``mean``; what lies outside an image's own size is never
                looked at.
            sizes: ``(B, 2)`` integer heights and widths of the images inside the batch.
            keys: ``(B,)`` int64, the only source of randomness; see :func:`relvit_d2.utils.randomness.image_keys`.

        Returns:
            ``(B, C, h, w)`` float32 normalised views, and where their patches truly lie.
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
        pixels = self._make(images, boxes, flip, draw_cuts(config, keys), draws, window)
        return pixels, self._layout(images, draws and draws.slot)

    @torch.no_grad()
    def evaluate(self, images: Tensor, sizes: Tensor, keys: Tensor) -> tuple[Tensor, PatchLayout]:
        """Make the fixed view of each image: the largest centred crop, resized, with mega-patches and a permutation.

        Its patches keep their colours. Where views are cut or permuted, an image's ``key`` decides how, whatever the
        batch that it comes in.

        Args:
            images: as for :meth:`train`.
            sizes: as for :meth:`train`.
            keys: ``(B,)`` int64, such as the images' numbers in their data set.

        Returns:
            As :meth:`train`.
        """
        config, keys = self.config, keys.cpu()
        boxes = centre_boxes(sizes, config.crop)
        flip = torch.zeros(len(images), dtype=torch.bool, device=boxes.device)
        pixels = self._make(images, boxes, flip, draw_cuts(config, keys), None)
        slot = draw_slots(config, keys.to(images.device))
        if config.permute:
            pixels = permute_patches(pixels, config.patch_size, slot)
        return pixels, self._layout(images, slot)

    def _layout(self, images: Tensor, slot: Tensor | None) -> PatchLayout:
        layout = PatchLayout.full(len(images), self.config.grid, images.device)
        return layout.permuted(slot) if slot is not None and self.config.permute else layout

    def _make(
        self,
        images: Tensor,
        boxes: Tensor,
        flip: Tensor,
        cuts: tuple[Tensor, Tensor] | None,
        draws: PatchDraws | None,
        window: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        config, device = self.config, images.device
        mean, std = (torch.tensor(x, device=device).view(-1, 1, 1, 1) for x in (config.mean, config.std))
        out = torch.empty(len(images), images.shape[1], *config.shape, device=device)
        for part in self._passes(images):
            # Autocast would round the products to bfloat16, coarser than the images' own eight bits.
            with torch.autocast(device.type, enabled=False):
                some_cuts, some_window = (x and (x[0][part], x[1][part]) for x in (cuts, window))
                how = config.crop, some_cuts, config.shape, some_window
                view = resample(images[part], boxes[part], flip[part], *how)
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


def draw_cuts(config: ViewConfig, keys: Tensor) -> tuple[Tensor, Tensor] | None:
    """Draw where the bands of mega-patches begin and end along each axis; each choice of lines is equally probable.

    Args:
        config: sets the number of bands and the lines that a cut may lie on.
        keys: ``(B,)`` int64, what an image's cuts are hashed from.

    Returns:
        ``(B, bands + 1)`` int64 pixels of the crop, rows and columns; None without mega-patches.
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
    """Return the patch that is moved to each slot of a view, ``(B, N)`` int64, from ``keys``, ``(B,)`` int64."""
    patches = torch.arange(config.grid[0] * config.grid[1], device=keys.device)
    if not config.permute:
        return patches.expand(len(keys), -1)
    return hashed_words(keys[:, None], Draw.SLOT, patches).argsort(1)


def draw_patches(config: ViewConfig, keys: Tensor, device: torch.device | None = None) -> PatchDraws:
    """Draw what happens to each patch of a batch of views.

    Args:
        config: sets the ranges and probabilities.
        keys: ``(B,)`` int64, what all choices for an image are hashed from.
        device: where the choices are needed, by default on the keys' device. The jitter's order stays on the keys'
            device, which is the CPU where the sizes of the groups must be known without reading from a GPU.
    """
    patches = torch.arange(config.grid[0] * config.grid[1])

    def uniform(keys: Tensor, *draws: Draw) -> Tensor:
        kinds, numbers = torch.tensor(draws)[:, None, None].to(keys.device), patches.to(keys.device)
        return hashed_uniform(keys[:, None], kinds, numbers)

    jittered, order = uniform(keys, Draw.JITTERED, Draw.JITTER_ORDER)
    keys = keys.to(device or keys.device)
    factors = Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE
    drawn = uniform(keys, *factors, Draw.WINDOW_ROW, Draw.WINDOW_COLUMN, Draw.GRAY, Draw.NOISY)
    spread = torch.tensor(config.jitter, device=keys.device)[:, None, None]
    middle = torch.tensor((1.0, 1.0, 1.0, 0.0), device=keys.device)[:, None, None]
    # A factor is never negative; the hue turns both ways.
    low = torch.maximum(middle - spread, middle - 1)
    return PatchDraws(
        offset=(drawn[4:6] * (config.patch_size - config.window + 1)).long().movedim(0, 2),
        order=(order * len(ORDERS)).long(),
        factors=torch.lerp(low, middle + spread, drawn[:4]).movedim(0, 2),
        jittered=jittered < config.jitter_prob,
        gray=drawn[6] < config.gray_prob,
        noisy=drawn[7] < config.noise_prob,
        noise=hashed_words(keys[:, None], Draw.NOISE, patches.to(keys.device)),
        slot=draw_slots(config, keys),
    )


def augment_patches(view: Tensor, config: ViewConfig, draws: PatchDraws) -> Tensor:
    """Crop, resize and colour every patch on its own, then move the patches to their slots.

    Args:
        view: ``(C, B, h, w)`` float32 in 0..1.
        config: sizes of view, patch and window; what it switches off is skipped.
        draws: the choices of these B images, on any device.

    Returns:
        A new ``(C, B, h, w)`` in 0..1.
    """
    device, patch, window, channels = view.device, config.patch_size, config.window, len(view)
    batch, (rows, cols), width = view.shape[1], config.grid, config.shape[1]
    count = batch * rows * cols

    # Sorted by the step at which the jitter turns their hue, patches fall into groups that
    # share every kernel. The sizes of the groups are read where the order was drawn.
    operations = torch.tensor(ORDERS, device=draws.order.device)[draws.order.flatten()]
    hue_step = (operations == HUE).to(torch.uint8).argmax(1).masked_fill_(~draws.jittered.flatten(), 4)
    sort = hue_step.argsort()
    groups = hue_step.bincount(minlength=5)[:4].tolist()
    operations, sort = operations[sort].to(device), sort.to(device)
    offset, factors, gray = (
        x.to(device)[sort] for x in (draws.offset.flatten(0, 1), draws.factors.flatten(0, 1), draws.gray.flatten())
    )
    if channels != 3:
        factors[:, SATURATION] = 1

    corner = (sort // cols * width + sort % cols) * patch + offset[:, 0] * width + offset[:, 1]
    pixels = view.flatten(1).index_select(1, (_square(window, width)[:, None].to(device) + corner).flatten())
    if window != patch:
        whole = torch.tensor([window], device=device)
        weights = resize_weights(whole - window, whole, whole < 0, window, patch)
        pixels = torch.bmm(weights.expand(channels, -1, -1), pixels.view(channels, window, -1))
        pixels = torch.bmm(weights.expand(channels * patch, -1, -1), pixels.view(channels * patch, window, -1))
    pixels = pixels.view(channels, patch * patch, count)
    if config.jitter_prob:
        color_jitter_(pixels, factors.T.contiguous(), operations.T.contiguous(), groups)
    if config.gray_prob and channels == 3:
        grayscale_(pixels, gray)
    if config.noise_prob:
        noisy, noise = (x.flatten().to(device)[sort] for x in (draws.noisy, draws.noise))
        add_noise_(pixels, noisy, noise, config.noise_std)

    # Every slot of the view reads the column of the patch that it shows.
    column = torch.empty_like(sort).scatter_(0, sort, torch.arange(count, device=device))
    column = column.view(batch, -1).gather(1, draws.slot.to(device)).view(batch, rows, 1, cols, 1)
    index = column + _square(patch, patch).to(device).view(patch, 1, patch) * count
    return pixels.flatten(1).index_select(1, index.flatten()).view_as(view)


def permute_patches(views: Tensor, patch: int, slot: Tensor) -> Tensor:
    """Put patch ``slot[b, i]`` of ``(B, C, h, w)`` views into slot i, counted row by row; a new tensor."""
    batch, channels, height, width = views.shape
    apart = views.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
    patches = apart.flatten(1, 2)
    moved = patches[torch.arange(batch, device=views.device)[:, None], slot].view_as(apart)
    return moved.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def _square(side: int, stride: int) -> Tensor:
    """Offsets of the pixels of a square, row by row, in a plane whose rows are ``stride`` apart."""
    step = torch.arange(side)
    return (step[:, None] * stride + step).flatten()
