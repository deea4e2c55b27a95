"""Plain Vision Transformers: timm's implementation behind the encoder contract."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from relvit_d2.encoders.base import ENCODERS, Encoder, evenly
from relvit_d2.encoders.windowed import windowed_block
from relvit_d2.errors import UserError


class ViT(Encoder):
    """One map at the stride of the patch, after the final norm.

    The final norm is what the pretext heads of the method see (the authors' code,
    ``models/backbones/vit.py:255-258``), so the detector reads the same features.

    Args:
        dim, depth, heads: width of the tokens, number of blocks, attention heads a block.
        patch_size: side of a patch in pixels.
        img_size: side in pixels of the square image whose grid the position embedding is stored for;
            other sizes resample it (bicubic, antialiased).
        pos_embed: whether tokens carry a learnt position embedding.
        drop_path: stochastic depth of the last block, 0..1; earlier blocks linearly less.
        dropout: dropout after the embedding, the attention's projection and in the MLP, 0..1.
        in_chans: channels of the images.
        window: patches a side of the windows that attention is kept in; 0: it is global everywhere.
        global_blocks: blocks whose attention is global all the same, evenly spaced up to the last one.

    Raises:
        UserError: if ``img_size`` is not a multiple of ``patch_size``, ``window`` is negative, or there are not so many
            blocks.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        patch_size: int,
        img_size: int,
        pos_embed: bool,
        drop_path: float,
        dropout: float,
        in_chans: int,
        window: int,
        global_blocks: int,
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise UserError(
                f"MODEL.ENCODER.IMG_SIZE {img_size} is not a multiple of MODEL.ENCODER.PATCH_SIZE {patch_size}"
            )
        if window < 0 or not 0 <= global_blocks <= depth:
            raise UserError(
                f"MODEL.ENCODER.WINDOW {window} and GLOBAL_BLOCKS {global_blocks}: give a window of 0 (none) or more "
                f"patches, and 0 to {depth} blocks"
            )
        self.vit = VisionTransformer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            pos_embed="learn" if pos_embed else "none",
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_path_rate=drop_path,
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
        )
        self._taps = [depth - 1]
        globals_ = [depth * (i + 1) // global_blocks - 1 for i in range(global_blocks)]
        self._windows = [window if index not in globals_ else 0 for index in range(depth)]
        self.strides = {f"s{patch_size}": patch_size}
        self.channels = {f"s{patch_size}": dim}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See :class:`Encoder`; a side that is no multiple of the patch is padded with zeros, right and bottom."""
        grid = self.grid(*images.shape[-2:])
        outputs = self.tapped(images)
        return {name: x.transpose(1, 2).unflatten(2, grid) for name, x in zip(self.strides, outputs, strict=True)}

    def tokens(self, images: Tensor) -> Tensor:
        """See :class:`Encoder`; the sequence is the transformer's own, without the class token."""
        return self.tapped(images)[-1]

    def tapped(self, images: Tensor) -> list[Tensor]:
        """Return the tapped blocks' normed tokens ``(B, h * w, C)``, without the class token; the last block's last."""
        vit = self.vit
        return self.contextualise(vit.norm_pre(vit._pos_embed(vit.patch_embed(images))), self.grid(*images.shape[-2:]))

    def contextualise(self, x: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Run embedded tokens ``(B, prefix + h * w, C)`` of a grid through the blocks; see :meth:`tapped`."""
        vit, outputs = self.vit, []
        for index, block in enumerate(vit.blocks):
            window = self._windows[index]
            assert isinstance(block, Block)
            run = partial(windowed_block, block, grid=grid, window=window) if window else block
            x = checkpoint(run, x, use_reentrant=False) if vit.grad_checkpointing else run(x)
            if index in self._taps:
                outputs.append(vit.norm(x)[:, vit.num_prefix_tokens :])
        return outputs

    def tap(self, count: int) -> None:
        """See :class:`Encoder`; every map goes through the final norm."""
        self._taps = evenly(count, self.depth, self.name)
        names = [*(f"b{index + 1}" for index in self._taps[:-1]), self.last]
        self.strides = dict.fromkeys(names, self.strides[self.last])
        self.channels = dict.fromkeys(names, self.dim)

    def compile_passes(self) -> None:
        """See :class:`Encoder`; the embedding stays as it is.

        torch 2.11 fails to compile the gradient of resampled positions once the size of an image may vary.
        """
        self.contextualise = torch.compile(self.contextualise)  # type: ignore[method-assign]

    def checkpoint_blocks(self) -> None:
        """See :class:`Encoder`."""
        self.vit.set_grad_checkpointing()

    @property
    def carries_positions(self) -> bool:
        """See :class:`Encoder`: by the position embedding, or because a token sees who shares its window."""
        return self.vit.pos_embed is not None or any(self._windows)

    def fresh(self, source: dict[str, Any]) -> set[str]:
        """The position embedding is new when the source was trained without one, as the method's pre-training is."""
        return {"vit.pos_embed"} if self.arguments["pos_embed"] and not source["pos_embed"] else set()

    def adapt(self, name: str, value: Tensor, source: dict[str, Any]) -> Tensor | None:
        """Resample the position embedding from the source's own grid."""
        if name != "vit.pos_embed" or value.shape[-1] != self.dim:
            return None
        old = source["img_size"] // source["patch_size"]
        size = list(self.vit.patch_embed.grid_size)
        return resample_abs_pos_embed(value, size, [old, old], num_prefix_tokens=self.vit.num_prefix_tokens)


# name: (width, depth, heads). Tiny, small and base are those of "Training data-efficient image
# transformers" (Touvron et al., 2021, table 1) with base from "An Image is Worth 16x16 Words".
# Nano is what two CPU cores train in minutes.
_SIZES = {
    "vit_nano": (128, 4, 4),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}


def _builder(dim: int, depth: int, heads: int) -> Callable[..., Encoder]:
    def build(
        patch_size: int = 16,
        img_size: int = 224,
        pos_embed: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        in_chans: int = 3,
        window: int = 0,
        global_blocks: int = 4,
    ) -> Encoder:
        how = (patch_size, img_size, pos_embed, drop_path, dropout, in_chans, window, global_blocks)
        return ViT(dim, depth, heads, *how)

    return build


for _name, _size in _SIZES.items():
    ENCODERS.add(_name, _builder(*_size))
