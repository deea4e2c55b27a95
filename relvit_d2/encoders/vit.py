"""Plain Vision Transformers, implemented by timm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from relvit_d2.encoders.base import ENCODERS, FAMILIES, Encoder
from relvit_d2.encoders.plain import PlainEncoder, evenly_spaced
from relvit_d2.encoders.windowed import add_relative_positions, resized_table
from relvit_d2.utils.errors import UserError, nearest


class ViT(PlainEncoder):
    """A ViT: one map at the stride of the patch, after the final norm.

    The method's pretext heads read the tokens after the final norm (authors' code,
    ``models/backbones/vit.py:255-258``), so the detector reads the same features.

    Args:
        vit: timm's model without a head, for images of any size.
        window: side in patches of the attention windows; 0: global attention everywhere.
        global_blocks: number of blocks that keep global attention, evenly spaced up to the last one.
        rel_pos: whether every block has relative positions, initially zero.

    Raises:
        UserError: ``window`` or ``global_blocks`` is out of range, or the blocks support neither windows nor relative
            positions.
    """

    position_embedding = "vit.pos_embed"
    patch_embedding = "vit.patch_embed.proj.weight"

    def __init__(self, vit: VisionTransformer, window: int, global_blocks: int, rel_pos: bool) -> None:
        super().__init__(vit.patch_embed.patch_size[0], vit.embed_dim)
        depth = len(vit.blocks)
        if window < 0 or not 0 <= global_blocks <= depth:
            raise UserError(
                f"MODEL.ENCODER.WINDOW {window} and GLOBAL_BLOCKS {global_blocks}: give a window of 0 (none) or more "
                f"patches, and 0 to {depth} blocks"
            )
        self.vit = vit
        plain = self._plain_attentions()
        if (window or rel_pos) and len(plain) < depth:
            raise UserError(
                "the attention of this encoder supports neither windows nor relative positions: set "
                "MODEL.ENCODER.WINDOW 0 and REL_POS False"
            )
        if window:
            self._windows = dict.fromkeys(set(range(depth)) - {*evenly_spaced(global_blocks, depth)}, window)
        if rel_pos:
            for index, attention in enumerate(plain):
                side = self._windows.setdefault(index, 0) or vit.patch_embed.grid_size[0]
                add_relative_positions(attention, side)

    def _plain_attentions(self) -> list[Any]:
        """Return the attention of those blocks that support windows."""
        attentions = [block.attn for block in self.vit.blocks if isinstance(block, Block)]
        return [attention for attention in attentions if isinstance(attention, Attention)]

    @property
    def sequence_blocks(self) -> nn.Sequential | nn.ModuleList:
        return self.vit.blocks

    @property
    def final_norm(self) -> nn.Module:
        return self.vit.norm

    @property
    def prefix(self) -> int:
        return self.vit.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        return self.vit.cls_token is not None

    def embed(self, images: Tensor) -> Tensor:
        return self.vit.norm_pre(self.vit._pos_embed(self._embed_patches(images)))

    def _embed_patches(self, images: Tensor) -> Tensor:
        """Embed images as ``(B, h, w, C)``; timm's forward would copy images that need no padding."""
        embed = self.vit.patch_embed
        if torch.compiler.is_compiling() or any(side % embed.patch_size[0] for side in images.shape[-2:]):
            return embed(images)
        return embed.norm(embed.proj(images).permute(0, 2, 3, 1))

    @property
    def has_position_information(self) -> bool:
        """Whether there is a position embedding, or windows or relative positions, which depend on the position too."""
        return self.vit.pos_embed is not None or bool(self._windows)

    def accepts(self, key: str, value: Any) -> bool:
        """Also accepts patches that grow to less than twice their side."""
        if key == "patch_size":
            return bool(value <= self.arguments["patch_size"] < 2 * value)
        return super().accepts(key, value)

    def adapt(self, name: str, value: Tensor, source: dict[str, Any]) -> Tensor | None:
        """Resample the positions to this encoder's grid and the patch embedding to its patch size.

        The embedding of an enlarged patch equals that of the original patch ("FlexiViT", Beyer et al., 2023,
        section 3.4).
        """
        shape = self.state_dict()[name].shape
        if name == self.patch_embedding and value.shape[0] == shape[0]:
            gray = super().adapt(name, value, source)
            value = value if gray is None else gray
            return resample_patch_embed(value, list(shape[2:])) if value.shape[1] == shape[1] else None
        if name in self._relative_positions():
            return resized_table(value, shape[0]) if value.shape[1] == shape[1] else None
        if name != self.position_embedding or value.shape[-1] != self.dim:
            return None
        side = source["img_size"] // source["patch_size"]
        size = list(self.vit.patch_embed.grid_size)
        prefix = value.shape[1] - side * side
        return resample_abs_pos_embed(value, size, [side, side], num_prefix_tokens=prefix)

    def _positions_only_in(self, one: dict[str, Any], other: dict[str, Any]) -> set[str]:
        relative = one.get("rel_pos") and not other.get("rel_pos")
        return super()._positions_only_in(one, other) | (self._relative_positions() if relative else set())

    def _relative_positions(self) -> set[str]:
        return {f"vit.blocks.{i}.attn.rel_pos_{axis}" for i in range(self.depth) for axis in "hw"}


def vit_builder(make: Callable[..., VisionTransformer], encoder: type[ViT] = ViT) -> Callable[..., Encoder]:
    """Return the builder of an ``encoder``; ``make`` maps timm's keyword arguments to a model without a head."""

    def build(
        patch_size: int = 16,
        img_size: int = 224,
        pos_embed: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        in_chans: int = 3,
        window: int = 0,
        global_blocks: int = 4,
        rel_pos: bool = False,
    ) -> Encoder:
        """Build a ViT.

        Args:
            patch_size: side of a patch in pixels.
            img_size: side in pixels of the square image whose grid the position embedding is stored for; it is
                resampled (bicubic, antialiased) for images of other sizes.
            pos_embed: whether to add a learnt position embedding.
            drop_path: stochastic depth rate of the last block, 0..1; it decreases linearly towards the first.
            dropout: dropout rate after the embedding, after the attention projection and in the MLP, 0..1.
            in_chans: channels of the images.
            window, global_blocks, rel_pos: see :class:`ViT`.

        Raises:
            UserError: ``img_size`` is not a multiple of ``patch_size``.
        """
        if img_size % patch_size:
            raise UserError(
                f"MODEL.ENCODER.IMG_SIZE {img_size} is not a multiple of MODEL.ENCODER.PATCH_SIZE {patch_size}"
            )
        vit = make(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            drop_path_rate=drop_path,
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
            dynamic_img_size=True,  # resample the position embedding
            dynamic_img_pad=True,  # pad sides to whole patches
            **({} if pos_embed else {"pos_embed": "none"}),
        )
        return encoder(vit, window, global_blocks, rel_pos)

    return build


def _make_vit(dim: int, depth: int, heads: int, **arguments: Any) -> VisionTransformer:
    vit = VisionTransformer(num_classes=0, embed_dim=dim, depth=depth, num_heads=heads, **arguments)
    assert vit.cls_token is not None
    nn.init.trunc_normal_(vit.cls_token, std=0.02)  # authors' code; timm's is 1e-6
    return vit


# Name: (width, depth, heads). Tiny, small and base: "Training data-efficient image transformers" (Touvron et al.,
# 2021, table 1). Nano is small enough to train in minutes on two CPU cores.
SIZES = {
    "vit_nano": (128, 4, 4),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}

for _name, _size in SIZES.items():
    ENCODERS.add(_name, vit_builder(partial(_make_vit, *_size)))


# Large and huge: "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, table 1).
VITDET_SIZES = {name.removeprefix("vit_"): size for name, size in SIZES.items()} | {
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def _make_vitdet(dim: int, depth: int, heads: int, **arguments: Any) -> VisionTransformer:
    bare: dict[str, Any] = {"class_token": False, "final_norm": False, "global_pool": ""}
    return VisionTransformer(num_classes=0, embed_dim=dim, depth=depth, num_heads=heads, **bare, **arguments)


@FAMILIES.register("vitdet")
def vitdet(size: str) -> Callable[..., Encoder]:
    """Return the builder of a ViT without class token and without final norm, as ViTDet uses it.

    (Detectron2, ``modeling/backbone/vit.py``.) ViTDet has ``window=14`` and ``rel_pos=True`` in addition.

    Args:
        size: a name in :data:`VITDET_SIZES`.

    Raises:
        UserError: for another name.
    """
    if size not in VITDET_SIZES:
        raise UserError(f"unknown encoder 'vitdet:{size}'{nearest(size, list(VITDET_SIZES))}")
    return vit_builder(partial(_make_vitdet, *VITDET_SIZES[size]))
