"""Targets as functions of the layout, and their chance levels.

Functions of a pair take the positions of tokens i and j, int64 rows and columns that broadcast, so that losses can
compute any block of the ``(N, N)`` pairs, and the ``extent`` of the grid, ``(..., 2)`` rows and columns
(``extent`` of :class:`relvit_d2.pretext.layout.PatchLayout`).
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from relvit_d2.pretext.layout import PatchLayout

PairFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps rows and columns of tokens i, of tokens j, and the extent to the target of each pair."""

RELATIONS = ("LU", "CU", "RU", "LC", "CC", "RC", "LD", "CD", "RD")
"""Names of the nine relation classes: left/centre/right, then up/centre/down
(authors' code, datasets/encode_locations.py:76,121-128)."""


def pair_relation(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor, extent: Tensor) -> Tensor:
    """Return the class of a token's position relative to another: ``3*(sgn(dr)+1) + (sgn(dc)+1)``, int64 0..8.

    ``dr`` and ``dc`` are the first token's coordinates minus the other's, as in the authors' matrix after its final
    transpose, whose entry ``[i, j]`` is the position of i relative to j (authors' code,
    datasets/encode_locations.py:121-128,165). The ``extent`` is not used.
    """
    return torch.sign(row - other_row).mul_(3).add_(4) + torch.sign(col - other_col)


def pair_distance(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor, extent: Tensor) -> Tensor:
    """Return the distance of two tokens, from -1 (same cell) to 1 (diagonal of the grid), float32.

    ``2 * |p_i - p_j| / |p_last - p_first| - 1`` (authors' code, datasets/encode_locations.py:169-201).
    """
    diagonal = (extent - 1).square().sum(-1).sqrt().clamp(min=1)
    return ((row - other_row).square() + (col - other_col).square()).sqrt() / diagonal * 2 - 1


def pair_angle(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor, extent: Tensor) -> Tensor:
    """Return the authors' angle: between two tokens as seen from a point outside the grid, scaled to -1..1, float32.

    The point lies half the grid's height above and half its width left of the top left token; 1 is the angle between
    the top right and the bottom left token (authors' code, datasets/encode_locations.py:169-201). The angle is
    symmetric and does not determine a direction. The authors add 1e-4 to a product of norms, which changes their values
    by up to 0.006; these are exact.
    """
    height, width = extent.unbind(-1)
    row, other_row = row + height / 2, other_row + height / 2
    col, other_col = col + width / 2, other_col + width / 2
    angle = _subtended(row, col, other_row, other_col)
    most = _subtended(height / 2, 1.5 * width - 1, 1.5 * height - 1, width / 2)
    return angle / most.clamp(min=1e-6) * 2 - 1  # of one token alone it is 0


def _subtended(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor) -> Tensor:
    return torch.atan2((row * other_col - col * other_row).abs(), row * other_row + col * other_col)


def pair_bearing(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor, extent: Tensor) -> Tensor:
    """Return the direction from the other token to the first one in half turns, -1..1, float32.

    0 is right, 0.5 below, -0.5 above, 1 left; 0 for two tokens of one cell. The ``extent`` is not used.
    """
    return torch.atan2((row - other_row).float(), (col - other_col).float()) / math.pi


def all_pairs(function: PairFunction, layout: PatchLayout) -> Tensor:
    """Return the targets of all pairs, ``(B, N, N)``: ``[b, i, j]`` is token i relative to token j.

    Memory is quadratic in N. Pairs with an invalid token are not masked.
    """
    row, col = layout.row, layout.col
    return function(row[:, :, None], col[:, :, None], row[:, None], col[:, None], layout.extent[:, None, None])


def positions(layout: PatchLayout, grid: tuple[int, int] | None = None) -> Tensor:
    """Return the cell of each token, ``(B, N)`` int64, ``row * w + col`` in 0..h*w-1.

    Args:
        layout: positions of the tokens.
        grid: rows and columns ``(h, w)`` of a fixed grid over each image's ``extent``; None: the grid
            of the layout.
    """
    if grid is None:
        return layout.row * layout.grid[1] + layout.col
    height, width = layout.extent[:, None].unbind(-1)
    row, col = layout.row * grid[0] // height, layout.col * grid[1] // width
    return (row * grid[1] + col).clamp(max=grid[0] * grid[1] - 1)  # of invalid tokens


def relation_frequencies(grid: tuple[int, int], tokens: int | None = None) -> tuple[float, ...]:
    """Return the frequency of each of the nine classes among all ordered pairs, including pairs of a token with itself.

    With N = h*w: a corner class has (h-1)(w-1)/(4N), up and down (h-1)/(2N) each, left and right
    (w-1)/(2N) each, self 1/N. (For a corner: h(h-1)/2 row pairs times w(w-1)/2 column pairs over N^2.)

    Args:
        grid: rows and columns ``(h, w)``.
        tokens: K, for the expected frequencies in a uniformly random subset of K cells: self has 1/K, and the classes
            of two cells, all pairs of which are equally likely, have 1 - 1/K in their proportions. None: all cells.
    """
    height, width = grid
    cells = height * width
    corner = (height - 1) * (width - 1) / (4 * cells)
    vertical, horizontal = (height - 1) / (2 * cells), (width - 1) / (2 * cells)
    same = 1 / cells
    if tokens is not None and tokens < cells:
        factor = (1 - 1 / tokens) / (1 - same)
        same, corner, vertical, horizontal = 1 / tokens, corner * factor, vertical * factor, horizontal * factor
    return (corner, vertical, corner, horizontal, same, horizontal, corner, vertical, corner)


@cache
def pair_deviation(function: PairFunction, grid: tuple[int, int], tokens: int | None = None) -> float:
    """Return the standard deviation of a target over all pairs of a grid, the RMS error of the best constant.

    Args:
        function: the target.
        grid: rows and columns.
        tokens: number of cells of a random subset, as for :func:`relation_frequencies`; None: all cells.
    """
    layout = PatchLayout.full(1, grid)
    row, col, extent = layout.row[0], layout.col[0], layout.extent[0]
    total, same = torch.zeros(2, 2, dtype=torch.float64)  # of all pairs, of pairs of a cell with itself
    for i in range(len(row)):  # one row of pairs at a time, to save memory
        value = function(row[i], col[i], row, col, extent).double()
        total += torch.stack((value.sum(), value.square().sum()))
        same += torch.stack((value[i], value[i].square()))
    mean, square = (total / (cells := len(row)) ** 2).tolist()
    if tokens is not None and tokens < cells:
        share = 1 / tokens
        mean, square = (share * same / cells + (1 - share) * (total - same) / (cells * (cells - 1))).tolist()
    return math.sqrt(max(square - mean**2, 0.0))
