"""Swin Transformers, built from timm's modules with timm's parameter names."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from relvit_d2.encoders.base import ENCODERS, FAMILIES, Encoder
from relvit_d2.utils.errors import UserError, nearest

PATCH = 4  # pixels; this and the window: "Swin Transformer" (Liu et al., 2021), 3.1 and 3.3
WINDOW = 7  # tokens
# Width, blocks of each stage, and heads of each stage: "Swin Transformer", 3.3, and heads of width 32.
SWIN_SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
Shift = int | Tensor  # tokens


class Swin(Encoder):
    """A Swin: four maps of stride 4, 8, 16 and 32, the last one after the final norm.

    Images have any size: an image is padded to whole patches, a map to whole windows and, before downsampling, to an
    even size, with zeros on the right and below. Every second block shifts its windows by half a window along axes
    longer than a window. Features do not depend on a size given at construction. They equal those of the published
    classifiers at 224 pixels, and of the published detectors wherever every map is larger than a window.

    timm's forward pass rolls a map before it pads it, so if the map is not a multiple of the window, tokens of
    opposite edges attend to each other. Here it is padded first, as in the authors' detection code
    (``mmdet/models/backbones/swin_transformer.py``) and in Detectron2 (``modeling/backbone/swin.py``).

    Args:
        dim: channels of the first map; they double from map to map.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        patch_size: 4.
        drop_path: stochastic depth rate of the last block, 0..1; it decreases linearly towards the first.
        dropout: dropout rate after the attention projection and in the MLP, 0..1.
        in_chans: channels of the images.

    Raises:
        UserError: ``patch_size`` is not 4.
    """

    patch_embedding = "swin.patch_embed.proj.weight"

    def __init__(
        self,
        dim: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        patch_size: int,
        drop_path: float,
        dropout: float,
        in_chans: int,
    ) -> None:
        super().__init__()
        if patch_size != PATCH:
            raise UserError(f"MODEL.ENCODER.PATCH_SIZE {patch_size} is not supported by a Swin; set it to {PATCH}")
        self.stage_depths = depths
        self.swin = SwinTransformer(
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=dim,
            depths=depths,
            num_heads=heads,
            window_size=WINDOW,
            always_partition=True,
            strict_img_size=False,
            proj_drop_rate=dropout,
            drop_path_rate=drop_path,
        )
        self.strides = {f"s{PATCH << stage}": PATCH << stage for stage in range(len(depths))}
        self.channels = {name: dim << stage for stage, name in enumerate(self.strides)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        down, right = (-side % PATCH for side in images.shape[-2:])
        # F.pad by zero pixels would copy the images, and autograd would store the copy.
        x = self.swin.patch_embed(F.pad(images, (0, right, 0, down)) if down or right else images)
        maps = {}
        for name, stage in zip(self.strides, self.swin.layers, strict=True):
            assert isinstance(stage, SwinTransformerStage)
            x = maps[name] = _stage(stage, x)
        maps[self.last] = self.swin.norm(x)
        return {name: x.permute(0, 3, 1, 2) for name, x in maps.items()}

    def checkpoint_blocks(self) -> None:
        self.swin.set_grad_checkpointing()


def _stage(stage: SwinTransformerStage, x: Tensor) -> Tensor:
    """Downsample a map ``(B, h, w, C)``, except in the first stage, and run the blocks."""
    x = stage.downsample(x)
    shift = _shift(x.shape[1]), _shift(x.shape[2])
    mask = shift_mask(x, shift) if any(isinstance(by, Tensor) or by for by in shift) else None
    run = partial(checkpoint, _block, use_reentrant=False) if stage.grad_checkpointing else _block
    for index, block in enumerate(stage.blocks):
        assert isinstance(block, SwinTransformerBlock)
        x = run(block, x, shift, mask) if index % 2 else run(block, x, (0, 0), None)
    return x


def _shift(side: int) -> Shift:
    """Return the tokens by which windows are shifted on a map of ``side`` tokens.

    In ``torch.export`` it is a tensor, so that the program holds for maps of any size.
    """
    if isinstance(side, torch.SymInt):
        return torch.where(torch.scalar_tensor(side, dtype=torch.int64) > WINDOW, WINDOW // 2, 0)
    return WINDOW // 2 if side > WINDOW else 0


def _rolled(x: Tensor, shift: tuple[Shift, Shift], sign: int) -> Tensor:
    """Roll a map ``(B, h, w, C)`` by ``sign`` times the shift."""
    for axis, by in enumerate(shift, 1):
        if isinstance(by, Tensor):
            side = torch.scalar_tensor(x.shape[axis], dtype=torch.int64)
            x = x.index_select(axis, (torch.arange(x.shape[axis], device=x.device) - sign * by) % side)
        elif by:
            x = x.roll(sign * by, axis)
    return x


def _block(block: SwinTransformerBlock, x: Tensor, shift: tuple[Shift, Shift], mask: Tensor | None) -> Tensor:
    """Apply attention in windows offset by ``shift``, then the MLP, to a map ``(B, h, w, C)``."""
    height, width = x.shape[1:3]
    rows, cols = _count(height), _count(width)
    y = F.pad(block.norm1(x), (0, 0, 0, WINDOW * cols - width, 0, WINDOW * rows - height))
    y = block.attn(windows(_rolled(y, shift, -1)), mask)
    y = y.view(-1, rows, cols, WINDOW, WINDOW, y.shape[-1]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    x = x + block.drop_path1(_rolled(y, shift, 1)[:, :height, :width])
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def windows(x: Tensor) -> Tensor:
    """Partition maps ``(B, h, w, C)`` of whole windows into ``(B * windows, 49, C)`` in row-major order."""
    rows, cols = _count(x.shape[1]), _count(x.shape[2])
    x = x.unflatten(2, (cols, WINDOW)).unflatten(1, (rows, WINDOW)).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def _count(side: int) -> int:
    """Return the number of windows that cover a side; in this form torch.export can prove the shapes."""
    return (side + WINDOW - 1) // WINDOW


def shift_mask(x: Tensor, shift: tuple[Shift, Shift]) -> Tensor:
    """Return the attention mask of a shifted map: minus infinity between tokens that the roll made neighbours.

    Args:
        x: the map ``(B, h, w, C)`` before padding.
        shift: tokens by which the map is rolled up and left.

    Returns:
        ``(windows, 49, 49)``, added to the attention scores.
    """
    wrapped = []
    for side, by in zip(x.shape[1:3], shift, strict=True):
        length = WINDOW * _count(side)
        wrapped.append(torch.arange(length, device=x.device) >= length - by)
    label = windows((2 * wrapped[0][:, None] + wrapped[1])[None, ..., None])
    apart = label != label.transpose(1, 2)
    return torch.where(apart, float("-inf"), 0.0).to(x.dtype)


@FAMILIES.register("swin")
def swin(size: str) -> Callable[..., Encoder]:
    """Return the builder of a Swin with a size in :data:`SWIN_SIZES`.

    Raises:
        UserError: for another name.
    """
    if size not in SWIN_SIZES:
        raise UserError(f"unknown encoder 'swin:{size}'{nearest(size, list(SWIN_SIZES))}")

    def build(
        patch_size: int = PATCH,
        img_size: int = 224,
        pos_embed: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        in_chans: int = 3,
    ) -> Encoder:
        """Build a Swin.

        ``img_size`` and ``pos_embed`` have no effect: no weight depends on the image size, and the relative position
        bias is always used.
        """
        return Swin(*SWIN_SIZES[size], patch_size, drop_path, dropout, in_chans)

    return build


ENCODERS.add("swin_tiny", swin("tiny"))
