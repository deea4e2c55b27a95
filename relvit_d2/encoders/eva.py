"""Vision Transformers with rotary positions, implemented by timm (``timm/models/eva.py``).

Among them are DINOv3, EVA-02, Perception Encoder and RoPE-ViT. A rotary position rotates pairs of channels of a patch's
queries and keys by angles proportional to the row and the column of the patch, so scores of attention depend on the
offset between two patches ("Rotary Position Embedding for Vision Transformer", Heo et al., 2024, section 3). Prefix
tokens, such as a class token, are not rotated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionRope, RotaryEmbeddingDinoV3, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, nn

from relvit_d2.encoders.vit import ViT
from relvit_d2.encoders.windowed import Grid, global_block, within_windows
from relvit_d2.utils.errors import UserError

RotaryAttention = AttentionRope | EvaAttention


class EvaViT(ViT):
    """A ViT of timm's class ``Eva``: one map at the stride of the patch.

    Rotary positions are computed for the grid of each image, as timm computes them with ``dynamic_img_size``; a patch
    keeps the position that it has in the image within attention windows and in subsets of the tokens. Like a Swin's
    relative positions they are always used, whatever ``pos_embed``, which decides about the absolute position
    embedding of the models that have one.

    Args:
        vit: timm's model without a head, for images of any size.
        window, global_blocks: see :class:`ViT`.
        rel_pos: False.

    Raises:
        UserError: see :class:`ViT`; or ``rel_pos`` is True.
    """

    def __init__(self, vit: Any, window: int, global_blocks: int, rel_pos: bool) -> None:
        if rel_pos:
            raise UserError(
                "MODEL.ENCODER.REL_POS: this encoder of timm has no option for relative positions; set it to False"
            )
        super().__init__(vit, window, global_blocks, rel_pos=False)
        if isinstance(rope := vit.rope, RotaryEmbeddingDinoV3):
            settings = (rope.grid_indexing, rope.grid_offset, rope.normalize_coords, rope.min_period, rope.max_period)
            assert settings == ("ij", 0.0, "separate", None, None), f"rotary positions with {settings}"
            vit.rope = CentredRotations(rope.dim, rope.temperature, rotate_half=rope.rotate_half)

    def _plain_attentions(self) -> list[Any]:
        blocks = [block for block in self.vit.blocks if isinstance(block, EvaBlock)]
        return [block.attn for block in blocks if _is_plain(block.attn)]

    def embed(self, images: Tensor) -> Tensor:
        x, _ = self.vit._pos_embed(self._embed_patches(images))
        return self.vit.norm_pre(x)

    @property
    def has_position_information(self) -> bool:
        """Whether there are rotary positions, a position embedding or windows."""
        return self.vit.rope is not None or super().has_position_information

    def block_functions(self, grid: Grid, kept: Tensor | None) -> list[Callable[[Tensor], Tensor]]:
        rotations = self._rotations(grid, kept)
        functions: list[Callable[[Tensor], Tensor]] = []
        for index, (block, rotation) in enumerate(zip(self.vit.blocks, rotations, strict=True)):
            window = self._windows.get(index)
            functions.append(
                partial(global_block, block, rope=rotation)
                if window is None
                else partial(windowed_rotary_block, block, rope=rotation, grid=grid, window=window)
            )
        return functions

    def _rotations(self, grid: Grid, kept: Tensor | None) -> list[Tensor] | list[None]:
        """Return sine and cosine of the rotations of each block, ``(..., N, 2 * C / heads)``, in float32.

        They have no leading axes, an axis of the heads, or, for a subset of the tokens, axes of images and heads.
        """
        vit = self.vit
        if vit.rope is None:
            return [None] * len(vit.blocks)
        rope: Any = vit.rope
        table = rope.get_embed(shape=grid)
        if kept is not None:
            # (..., N, 2 * C / heads) to (..., B, heads or 1, K, 2 * C / heads)
            table = table if vit.rope_mixed else table[None]
            table = table[..., kept, :].movedim(-3, -4)
        return list(table.unbind(0)) if vit.rope_mixed else [table] * len(vit.blocks)

    def fresh(self, source: dict[str, Any]) -> set[str]:
        return super().fresh(source) & self.state_dict().keys()  # not every model has a position embedding


class CentredRotations(RotaryEmbeddingDinoV3):
    """timm's rotary positions of DINOv3, in a form that ``torch.export`` does not fix to one size of an image."""

    def _create_embed(self, feat_shape: list[int], no_aug: bool = False) -> Tensor:
        """Return sine and cosine ``(rows * cols, 2 * C / heads)``; coordinates of patches are their centres in -1..1.

        (``timm/layers/pos_embed_sincos.py``: ``_build_grid``, ``RotaryEmbeddingDinoV3``)
        """
        device = self.get_buffer("periods").device
        axes = [(torch.arange(side, device=device) + 0.5) / side * 2 - 1 for side in feat_shape]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        return torch.cat(self._get_pos_embed_from_coords(coordinates), dim=-1)


def _is_plain(attention: nn.Module) -> bool:
    """Whether :func:`rotary_attention` computes the attention: no norm of queries and keys, no gate, no shared keys."""
    return (
        isinstance(attention, RotaryAttention)
        and isinstance(attention.q_norm, nn.Identity)
        and attention.gate is None
        and getattr(attention, "num_kv_groups", 1) == 1
    )


def windowed_rotary_block(block: Any, x: Tensor, rope: Tensor | None, grid: Grid, window: int) -> Tensor:
    """Run timm's block with :func:`rotary_attention` on ``(B, prefix + rows * cols, C)``; the shape is kept."""
    attended = rotary_attention(block.attn, block.norm1(x), rope, grid, window)
    x = x + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
    mixed = block.mlp(block.norm2(x))
    return x + block.drop_path2(mixed if block.gamma_2 is None else block.gamma_2 * mixed)


def rotary_attention(attention: Any, x: Tensor, rope: Tensor | None, grid: Grid, window: int) -> Tensor:
    """Apply attention in windows, like :func:`relvit_d2.encoders.windowed.windowed_attention`.

    Queries and keys are rotated before the windows are cut, so each patch has its position in the image. Padding is not
    rotated.

    Args:
        attention: the weights, an attention with rotary positions of timm.
        x: normed tokens ``(B, prefix + rows * cols, C)``.
        rope: sine and cosine ``([heads,] rows * cols, 2 * C / heads)``; None: no rotation.
        grid: rows and columns of patches.
        window: side of a window in patches, at least 1.

    Returns:
        ``(B, prefix + rows * cols, C)``.
    """
    qkv = _projected(attention, x)
    fill = _projected(attention, x.new_zeros(1, 1, x.shape[2]))[0, 0]
    if rope is not None:
        prefix = attention.num_prefix_tokens
        parts = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3, B, heads, N, C / heads
        rotated = apply_rot_embed_cat(parts[:2, :, :, prefix:], rope, half=attention.rotate_half)
        rotated = torch.cat((parts[:2, :, :, :prefix], rotated), dim=3)
        qkv = torch.cat((rotated, parts[2:])).permute(1, 3, 0, 2, 4).flatten(2)
    out = within_windows(attention, qkv, grid, window, fill)
    return attention.proj_drop(attention.proj(attention.norm(out)))


def _projected(attention: Any, x: Tensor) -> Tensor:
    """Project tokens ``(B, N, C)`` to queries, keys and values ``(B, N, 3 * C)``."""
    if attention.qkv is None:
        return torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], dim=2)
    out = attention.qkv(x)
    if getattr(attention, "q_bias", None) is None:
        return out
    return out + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
