"""Plain Vision Transformers: timm's implementation behind the encoder contract."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relvit_d2.encoders.base import ENCODERS, Encoder, evenly, spaced
from relvit_d2.encoders.windowed import windowed_block
from relvit_d2.utils.errors import UserError

# Arguments of timm's transformer: sides that are no multiples of the patch are padded, positions resampled.
ANY_SIZE: dict[str, Any] = {"dynamic_img_size": True, "dynamic_img_pad": True}


class ViT(Encoder):
    """One map at the stride of the patch, after the final norm.

    The final norm is what the pretext heads of the method see (the authors' code,
    ``models/backbones/vit.py:255-258``), so the detector reads the same features.

    Args:
        vit: timm's transformer, made for images of any size (:data:`ANY_SIZE`) and without a head.
        window: patches a side of the windows that attention is kept in; 0: it is global everywhere.
        global_blocks: blocks whose attention is global all the same, evenly spaced up to the last one.

    Raises:
        UserError: if ``window`` is negative or these blocks cannot have one, or there are not so many.
    """

    def __init__(self, vit: VisionTransformer, window: int, global_blocks: int) -> None:
        super().__init__()
        depth = len(vit.blocks)
        if window < 0 or not 0 <= global_blocks <= depth:
            raise UserError(
                f"MODEL.ENCODER.WINDOW {window} and GLOBAL_BLOCKS {global_blocks}: give a window of 0 (none) or more "
                f"patches, and 0 to {depth} blocks"
            )
        if window and not all(isinstance(block, Block) and isinstance(block.attn, Attention) for block in vit.blocks):
            raise UserError("the blocks of this encoder have attention of another kind: set MODEL.ENCODER.WINDOW 0")
        self.vit = vit
        patch_size, dim = vit.patch_embed.patch_size[0], vit.embed_dim
        self._taps = [depth - 1]
        globals_ = spaced(global_blocks, depth)
        self._windows = [window if index not in globals_ else 0 for index in range(depth)]
        self.strides = {f"s{patch_size}": patch_size}
        self.channels = {f"s{patch_size}": dim}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See :class:`Encoder`; a side that is no multiple of the patch is padded with zeros, right and bottom."""
        grid = self.grid(*images.shape[-2:])
        outputs = [x[:, self.vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid) for x in self.tapped(images)]
        return dict(zip(self.strides, outputs, strict=True))

    def tokens(self, images: Tensor) -> Tensor:
        """See :class:`Encoder`; the sequence is the transformer's own, without the class token."""
        return self.tapped(images)[-1][:, self.vit.num_prefix_tokens :]

    def tapped(self, images: Tensor) -> list[Tensor]:
        """Return the tapped blocks' normed sequences ``(B, prefix + h * w, C)``, the last block's last."""
        vit = self.vit
        return self.forward_blocks(vit.norm_pre(vit._pos_embed(self._patches(images))), self.grid(*images.shape[-2:]))

    def _patches(self, images: Tensor) -> Tensor:
        """Embed images, ``(B, h, w, C)``.

        Padding by nothing, as timm's pass does it, would copy them, and the copy would be kept for the backward pass.
        """
        embed = self.vit.patch_embed
        if torch.compiler.is_compiling() or any(side % embed.patch_size[0] for side in images.shape[-2:]):
            return embed(images)
        return embed.norm(embed.proj(images).permute(0, 2, 3, 1))

    def forward_blocks(self, x: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Run embedded tokens ``(B, prefix + h * w, C)`` of a grid through the blocks; see :meth:`tapped`."""
        vit, outputs = self.vit, []
        for index, (block, window) in enumerate(zip(vit.blocks, self._windows, strict=True)):
            run = partial(windowed_block, block, grid=grid, window=window) if window else block
            x = checkpoint(run, x, use_reentrant=False) if vit.grad_checkpointing else run(x)
            if index in self._taps:
                outputs.append(vit.norm(x))
        return outputs

    def select_blocks(self, count: int) -> None:
        """See :class:`Encoder`; every map goes through the final norm."""
        self._taps = evenly(count, self.depth, self.name)
        names = [*(f"b{index + 1}" for index in self._taps[:-1]), self.last]
        self.strides = dict.fromkeys(names, self.strides[self.last])
        self.channels = dict.fromkeys(names, self.dim)

    def pooled_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Encoder`: the class token where there is one."""
        sequence = self.tapped(images)[-1]
        tokens = sequence[:, self.vit.num_prefix_tokens :]
        return tokens.mean(1) if self.vit.cls_token is None else sequence[:, 0], tokens

    def compile_passes(self) -> None:
        """See :class:`Encoder`; the embedding stays as it is.

        torch 2.11 fails to compile the gradient of resampled positions once the size of an image may vary.
        """
        self.forward_blocks = torch.compile(self.forward_blocks)  # type: ignore[method-assign]

    def checkpoint_blocks(self) -> None:
        """See :class:`Encoder`."""
        self.vit.set_grad_checkpointing()

    @property
    def has_position_information(self) -> bool:
        """See :class:`Encoder`: by the position embedding, or because a token sees who shares its window."""
        return self.vit.pos_embed is not None or any(self._windows)

    def fresh(self, source: dict[str, Any]) -> set[str]:
        """The position embedding is new when the source was trained without one, as the method's pre-training is."""
        return {"vit.pos_embed"} if self.arguments["pos_embed"] and not source["pos_embed"] else set()

    def lacks(self, source: dict[str, Any]) -> set[str]:
        """See :class:`Encoder`: the position embedding, as in the method's pre-training."""
        return {"vit.pos_embed"} if source["pos_embed"] and not self.arguments["pos_embed"] else set()

    def accepts(self, key: str, value: Any) -> bool:
        """See :class:`Encoder`: a patch may grow to less than twice its side, colour become gray."""
        if key == "patch_size":
            return bool(value <= self.arguments["patch_size"] < 2 * value)
        return super().accepts(key, value) or (key == "in_chans" and (value, self.arguments["in_chans"]) == (3, 1))

    def adapt(self, name: str, value: Tensor, source: dict[str, Any]) -> Tensor | None:
        """Resample the position embedding from the source's own grid, and the patches from their own size.

        Patches are resampled so that the embedding of an enlarged patch is that of the patch ("FlexiViT", Beyer et
        al., 2023, section 3.4), and summed over the colours so that that of a gray image is that of its gray copies.
        """
        own = self.state_dict()[name].shape
        if name == "vit.patch_embed.proj.weight" and value.shape[0] == own[0]:
            value = value.sum(1, keepdim=True) if own[1] == 1 else value
            return resample_patch_embed(value, list(own[2:])) if value.shape[1] == own[1] else None
        if name != "vit.pos_embed" or value.shape[-1] != self.dim:
            return None
        old = source["img_size"] // source["patch_size"]
        size = list(self.vit.patch_embed.grid_size)
        prefix = value.shape[1] - old * old
        return resample_abs_pos_embed(value, size, [old, old], num_prefix_tokens=prefix)


def divided(img_size: int, patch_size: int) -> None:
    """Refuse an image for position embeddings that is not of whole patches.

    Raises:
        UserError: if ``img_size`` is not a multiple of ``patch_size``.
    """
    if img_size % patch_size:
        raise UserError(f"MODEL.ENCODER.IMG_SIZE {img_size} is not a multiple of MODEL.ENCODER.PATCH_SIZE {patch_size}")


# name: (width, depth, heads). Tiny, small and base are those of "Training data-efficient image
# transformers" (Touvron et al., 2021, table 1) with base from "An Image is Worth 16x16 Words".
# Nano is what two CPU cores train in minutes.
SIZES = {
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
        """Build a ViT.

        Args:
            patch_size: side of a patch in pixels.
            img_size: side in pixels of the square image whose grid the position embedding is stored for;
                other sizes resample it (bicubic, antialiased).
            pos_embed: whether tokens carry a learnt position embedding.
            drop_path: stochastic depth of the last block, 0..1; earlier blocks linearly less.
            dropout: dropout after the embedding, the attention's projection and in the MLP, 0..1.
            in_chans: channels of the images.
            window, global_blocks: see :class:`ViT`.

        Raises:
            UserError: if ``img_size`` is not a multiple of ``patch_size``.
        """
        divided(img_size, patch_size)
        vit = VisionTransformer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            pos_embed="learn" if pos_embed else "none",
            drop_path_rate=drop_path,
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
            **ANY_SIZE,
        )
        assert vit.cls_token is not None
        nn.init.trunc_normal_(vit.cls_token, std=0.02)  # as the authors'; timm's is 1e-6
        return ViT(vit, window, global_blocks)

    return build


for _name, _size in SIZES.items():
    ENCODERS.add(_name, _builder(*_size))
