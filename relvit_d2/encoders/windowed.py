"""Transformer blocks with global and window attention, and relative positions.

"Exploring Plain Vision Transformer Backbones for Object Detection" (Li et al., 2022), section 3: attention in
non-overlapping windows without shifts; a few blocks with global attention exchange information between windows. The
weights are those of global attention.

Relative positions are those of Detectron2's ViT (``modeling/backbone/utils.py:63-127``), decomposed into rows and
columns as in "MViTv2" (Li et al., 2022), section 4.1: between query q at (i, j) and key k at (i', j') the score
q k / sqrt(d) becomes q k / sqrt(d) + q R_h[i - i'] + q R_w[j - j'].
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
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


def global_block(block: nn.Module, x: Tensor, **arguments: Tensor | None) -> Tensor:
    """Run a block on ``(B, N, C)``, timm's with the faster kind of attention; the shape is kept.

    ``arguments`` are further arguments of the block.
    """
    attention: Any = getattr(block, "attn", None)
    switchable = isinstance(attention, Attention | AttentionRope | EvaAttention)
    if not switchable or not attention.fused_attn or fused_is_faster(x.shape[1], x.device):
        return block(x, **arguments)
    attention.fused_attn = False
    try:
        return block(x, **arguments)
    finally:
        attention.fused_attn = True


def add_relative_positions(attention: Attention, side: int) -> None:
    """Add tables of relative positions, zero, for ``side`` x ``side`` patches: ``(2 * side - 1, C / heads)`` each."""
    for axis in ("h", "w"):
        table = torch.zeros(2 * side - 1, attention.head_dim)
        attention.register_parameter(f"rel_pos_{axis}", nn.Parameter(table))


def resized_table(table: Tensor, length: int) -> Tensor:
    """Resize a table of relative positions ``(L, C)`` linearly to ``(length, C)``, as Detectron2 does."""
    return F.interpolate(table.T[None], size=length, mode="linear")[0].T


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
    class token, attend to all tokens and belong to every window. Relative positions hold between patches.

    Args:
        attention: the weights.
        x: normed tokens ``(B, prefix + rows * cols, C)``.
        grid: rows and columns of patches.
        window: side of a window in patches; 0: global attention, with relative positions.

    Returns:
        ``(B, prefix + rows * cols, C)``.
    """
    qkv = attention.qkv(x)
    if window:
        out = within_windows(attention, qkv, grid, window, attention.qkv.bias)
    else:
        out = _everywhere(attention, qkv, grid)
    return attention.proj_drop(attention.proj(attention.norm(out)))


def within_windows(attention: Attention, qkv: Tensor, grid: Grid, window: int, fill: Tensor | None) -> Tensor:
    """Map projected tokens ``(B, prefix + rows * cols, 3 * C)`` to outputs ``(B, prefix + rows * cols, C)``.

    Padded tokens are projected to ``fill`` of shape ``(3 * C,)``, or zero.
    """
    rows, cols = grid
    prefix = qkv.shape[1] - rows * cols
    sides = (window if rows > window else rows), (window if cols > window else cols)
    windows = partition(qkv[:, prefix:].unflatten(1, grid), sides, fill)
    count = windows.shape[0] // qkv.shape[0]
    before = qkv[:, :prefix]
    if prefix:
        # repeat_interleave would need a constant count in ONNX.
        windows = torch.cat((before[:, None].expand(-1, count, -1, -1).flatten(0, 1), windows), dim=1)
    queries, keys, values = _heads(attention, windows)
    bias = _relative_bias(attention, queries[:, :, prefix:], sides, window) if hasattr(attention, "rel_pos_h") else None
    attended = _attend(attention, queries, keys, values, prefix, None if bias is None else F.pad(bias, (prefix, 0)))
    out = unpartition(attended, sides, grid).flatten(1, 2)
    if prefix:
        _, keys, values = _heads(attention, qkv)
        queries, _, _ = _heads(attention, before)
        out = torch.cat((_attend(attention, queries, keys, values, 0), out), dim=1)
    return out


def _everywhere(attention: Attention, qkv: Tensor, grid: Grid) -> Tensor:
    """As :func:`within_windows`, with global attention and relative positions."""
    queries, keys, values = _heads(attention, qkv)
    prefix = qkv.shape[1] - grid[0] * grid[1]
    bias = _relative_bias(attention, queries[:, :, prefix:], grid, 0)
    return _attend(attention, queries, keys, values, 0, F.pad(bias, (prefix, 0, prefix, 0)))


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


def _attend(
    attention: Attention, queries: Tensor, keys: Tensor, values: Tensor, first: int, bias: Tensor | None = None
) -> Tensor:
    """Return the attention output of the queries from the ``first``-th on, ``(B, N - first, C)``.

    ``bias`` of shape ``(B, heads, N - first, N)`` is added to the scores.
    """
    dropout = attention.attn_drop.p if attention.training else 0.0
    queries = queries[:, :, first:]
    if fused_is_faster(keys.shape[2], keys.device):
        out = F.scaled_dot_product_attention(queries, keys, values, bias, dropout_p=dropout)
    else:
        scores = queries * attention.scale @ keys.transpose(2, 3)
        out = F.dropout((scores if bias is None else scores + bias).softmax(3), dropout) @ values
    return out.transpose(1, 2).flatten(2)


def _relative_bias(attention: Attention, queries: Tensor, sides: Grid, window: int) -> Tensor:
    """Return the biases ``(B, heads, N, N)`` of relative positions for queries ``(B, heads, N, C / heads)`` of a grid.

    The table of a window is cut to a shorter side; the table of global attention is resized to the side of the grid.
    """
    grid = queries.unflatten(2, sides)
    tables = [
        _by_offset(getattr(attention, f"rel_pos_{axis}"), side, window) for axis, side in zip("hw", sides, strict=True)
    ]
    down = torch.einsum("bnhwc,hkc->bnhwk", grid, tables[0].to(grid.dtype))
    across = torch.einsum("bnhwc,wkc->bnhwk", grid, tables[1].to(grid.dtype))
    return (down[..., None] + across[..., None, :]).flatten(4).flatten(2, 3)


def _by_offset(table: Tensor, side: int, window: int) -> Tensor:
    """Return the rows of a table ``(L, C)`` by the positions of query and key on a side, ``(side, side, C)``."""
    if window:
        table = table[window - side : window + side - 1]
    elif torch.compiler.is_compiling() or table.shape[0] != 2 * side - 1:
        table = resized_table(table, 2 * side - 1)
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place + side - 1]
