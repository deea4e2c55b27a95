"""Transformer blocks with global and with window attention.

"Exploring Plain Vision Transformer Backbones for Object Detection" (Li et al., 2022), section 3: attention in
non-overlapping windows without shifts; a few blocks with global attention exchange information between windows. The
weights are those of global attention.
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

Grid = tuple[int, int]

FUSED_FROM = 600  # tokens from which torch's fused attention is as fast as plain products in bfloat16 on a CPU


def fused_is_faster(tokens: int, device: torch.device) -> bool:
    """Return whether fused attention is faster than plain products for so many tokens (``benchmarks.attention``).

    The backward pass of torch's fused attention for CPUs multiplies small blocks, which takes five times as long as
    whole products for 65 tokens in bfloat16.
    """
    bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    trained_on_cpu = device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return not (trained_on_cpu and bfloat16 and tokens < FUSED_FROM)


def global_block(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block on ``(B, N, C)``, timm's with the faster kind of attention; the shape is kept."""
    if isinstance(attention := getattr(block, "attn", None), Attention):
        attention.fused_attn = fused_is_faster(x.shape[1], x.device)  # type: ignore[misc]
    return block(x)


def windowed_block(block: nn.Module, x: Tensor, grid: Grid, window: int) -> Tensor:
    """Run timm's block with :func:`windowed_attention` on ``(B, prefix + rows * cols, C)``; the shape is kept."""
    assert isinstance(block, Block) and isinstance(block.attn, Attention)
    x = x + block.drop_path1(block.ls1(windowed_attention(block.attn, block.norm1(x), grid, window)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def windowed_attention(attention: Attention, x: Tensor, grid: Grid, window: int) -> Tensor:
    """Apply attention in windows of ``window`` x ``window`` patches, counted from the top left corner.

    A grid that does not fill its last windows is padded with zeros on the right and below, which take part, as in
    Detectron2 (``modeling/backbone/utils.py:16-40``, after the norm and before the projection to queries, keys and
    values). A side not longer than the window is not padded: there the attention is global. Prefix tokens, such as a
    class token, attend to all tokens and belong to every window.

    Args:
        attention: the weights.
        x: normed tokens ``(B, prefix + rows * cols, C)``.
        grid: rows and columns of patches.
        window: side of a window in patches.

    Returns:
        ``(B, prefix + rows * cols, C)``.
    """
    rows, cols = grid
    prefix = x.shape[1] - rows * cols
    sides = (window if rows > window else rows), (window if cols > window else cols)
    qkv = attention.qkv(x)
    windows = partition(qkv[:, prefix:].unflatten(1, grid), sides, attention.qkv.bias)
    count = windows.shape[0] // x.shape[0]
    before = qkv[:, :prefix]
    if prefix:
        # repeat_interleave would need a constant count in ONNX.
        windows = torch.cat((before[:, None].expand(-1, count, -1, -1).flatten(0, 1), windows), dim=1)
    out = unpartition(_attend(attention, *_heads(attention, windows), prefix), sides, grid).flatten(1, 2)
    if prefix:
        _, keys, values = _heads(attention, qkv)
        queries, _, _ = _heads(attention, before)
        out = torch.cat((_attend(attention, queries, keys, values, 0), out), dim=1)
    return attention.proj_drop(attention.proj(attention.norm(out)))


def partition(x: Tensor, sides: Grid, fill: Tensor | None) -> Tensor:
    """Partition maps ``(B, rows, cols, C)`` into windows ``(B * windows, sides[0] * sides[1], C)``, row-major.

    The last windows are padded with ``fill`` of shape ``(C,)``, or zero.
    """
    (rows, cols), (high, wide) = x.shape[1:3], sides
    down, right = _count((rows, cols), sides)
    if torch.compiler.is_compiling() or (rows, cols) != (down * high, right * wide):
        x = F.pad(x if fill is None else x - fill, (0, 0, 0, right * wide - cols, 0, down * high - rows))
        x = x if fill is None else x + fill
    x = x.reshape(-1, down, high, right, wide, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, high * wide, x.shape[-1])


def unpartition(windows: Tensor, sides: Grid, grid: Grid) -> Tensor:
    """Invert :func:`partition`: windows to maps ``(B, rows, cols, C)`` without the padding."""
    (rows, cols), (high, wide) = grid, sides
    down, right = _count(grid, sides)
    x = windows.reshape(-1, down, right, high, wide, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, down * high, right * wide, x.shape[-1])
    return F.pad(x, (0, 0, 0, cols - right * wide, 0, rows - down * high))


def _count(grid: Grid, sides: Grid) -> Grid:
    """Return the number of windows that cover the grid, vertically and horizontally."""
    (rows, cols), (high, wide) = grid, sides
    # -(-a // b) would be wrong in ONNX, which rounds the division of negative numbers towards zero.
    return (rows + high - 1) // high, (cols + wide - 1) // wide


def _heads(attention: Attention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split projected tokens ``(B, N, 3 * C)`` into queries, keys and values ``(B, heads, N, C / heads)``."""
    q, k, v = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention.q_norm(q), attention.k_norm(k), v


def _attend(attention: Attention, queries: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
    """Return the attention output of the queries from the ``first``-th on, ``(B, N - first, C)``."""
    dropout = attention.attn_drop.p if attention.training else 0.0
    queries = queries[:, :, first:]
    if fused_is_faster(keys.shape[2], keys.device):
        out = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
    else:
        weights = (queries * attention.scale @ keys.transpose(2, 3)).softmax(3)
        out = F.dropout(weights, dropout) @ values
    return out.transpose(1, 2).flatten(2)
