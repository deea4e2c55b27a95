"""Targets as pure functions of a layout, and what guessing from their frequencies would score.

The functions of a pair take the places of tokens i and j, int64 rows and columns that broadcast, so that the losses
form any block of the ``(N, N)`` pairs by itself, and the ``extent`` of the grid, ``(..., 2)`` rows and columns that
broadcast with the places (:meth:`relvit_d2.pretext.layout.PatchLayout.extent`).
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from relvit_d2.pretext.layout import PatchLayout

PairFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Rows and columns of tokens i, of tokens j, and the extent, to a target of each pair."""

RELATIONS = ("LU", "CU", "RU", "LC", "CC", "RC", "LD", "CD", "RD")
"""Names of the nine relation classes: left/centre/right, then up/centre/down
(authors' code, datasets/encode_locations.py:76,121-128)."""


class Chance(NamedTuple):
    """The score of a guesser that knows how frequent the classes are and nothing else.

    Attributes:
        accuracy: share of the most frequent class, 0..1.
        entropy: the cross entropy that such a guesser reaches, in nats.
    """

    accuracy: float
    entropy: float


def pair_relation(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor, extent: Tensor) -> Tensor:
    """Class of where a token lies as seen from another: ``3*(sgn(dr)+1) + (sgn(dc)+1)``, int64 0..8.

    ``dr`` and ``dc`` are the first token's coordinates minus the other's. The orientation is that of the authors'
    matrix after its final transpose, where entry ``[i, j]`` tells where i is relative to j (authors' code,
    datasets/encode_locations.py:121-128,165). The ``extent`` does not matter.
    """
    return torch.sign(row - other_row).mul_(3).add_(4) + torch.sign(col - other_col)


def pair_distance(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor, extent: Tensor) -> Tensor:
    """Distance of two tokens, -1 for none to 1 for the diagonal of the grid, float32.

    ``2 * |p_i - p_j| / |p_last - p_first| - 1`` (authors' code, datasets/encode_locations.py:169-201).
    """
    diagonal = (extent - 1).square().sum(-1).sqrt().clamp(min=1)
    return ((row - other_row).square() + (col - other_col).square()).sqrt() / diagonal * 2 - 1


def pair_angle(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor, extent: Tensor) -> Tensor:
    """Angle that two tokens subtend at a point outside the grid, the authors': -1 (none) to 1 (the most), float32.

    The point lies half a grid's height above and half its width left of the first token; the most is what the top
    right and the bottom left token subtend (authors' code, datasets/encode_locations.py:169-201). It tells neither
    direction nor order of the two. The authors add 1e-4 to a product of norms, which moves their values by up to
    0.006; these are exact.
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
    """Direction in which a token lies as seen from another, in half turns: -1..1, float32.

    0 is right, 0.5 below, -0.5 above, 1 left. It does not depend on the ``extent``; a token has no bearing to one in
    the same cell, for which this is 0.
    """
    return torch.atan2((row - other_row).float(), (col - other_col).float()) / math.pi


def all_pairs(function: PairFunction, layout: PatchLayout) -> Tensor:
    """Return a function of pairs for all of them, ``(B, N, N)``: ``[b, i, j]`` is token i as seen from token j.

    Meant for pictures and small grids; the losses form the same values block by block. Pairs with an invalid token
    have a value too: mask them where it matters.
    """
    row, col = layout.row, layout.col
    places = row[:, :, None], col[:, :, None], row[:, None, :], col[:, None, :]
    return function(*places, layout.extent()[:, None, None])


def positions(layout: PatchLayout, grid: tuple[int, int] | None = None) -> Tensor:
    """Return the cell of each token, ``(B, N)`` int64, ``row * w + col`` in 0..h*w-1.

    Args:
        layout: where the tokens lie.
        grid: rows and columns ``(h, w)`` of a fixed grid that is laid over each image's :meth:`~PatchLayout.extent`;
            None for the layout's own grid, cell by cell.
    """
    if grid is None:
        return layout.row * layout.grid[1] + layout.col
    height, width = layout.extent()[:, None].unbind(-1)
    row, col = layout.row * grid[0] // height, layout.col * grid[1] // width
    return (row * grid[1] + col).clamp(max=grid[0] * grid[1] - 1)  # invalid tokens may lie beyond


def relation_frequencies(grid: tuple[int, int]) -> tuple[float, ...]:
    """Return the share of each of the nine classes among all ordered pairs, self pairs included.

    With N = h*w: a corner class has (h-1)(w-1)/(4N), up and down (h-1)/(2N) each, left and right
    (w-1)/(2N) each, self 1/N. (For a corner: h(h-1)/2 row pairs times w(w-1)/2 column pairs over N^2.)
    """
    height, width = grid
    cells = height * width
    corner = (height - 1) * (width - 1) / (4 * cells)
    vertical, horizontal = (height - 1) / (2 * cells), (width - 1) / (2 * cells)
    return (corner, vertical, corner, horizontal, 1 / cells, horizontal, corner, vertical, corner)


def relation_chance(grid: tuple[int, int]) -> Chance:
    """Return the majority share and the entropy of the relation classes on a grid ``(h, w)``."""
    shares = relation_frequencies(grid)
    return Chance(max(shares), -sum(share * math.log(share) for share in shares if share > 0))


def position_chance(grid: tuple[int, int]) -> Chance:
    """Return 1/N and ln N: every cell of a grid ``(h, w)`` of N cells is equally frequent."""
    cells = grid[0] * grid[1]
    return Chance(1 / cells, math.log(cells))


@cache
def pair_deviation(function: PairFunction, grid: tuple[int, int]) -> float:
    """Return the standard deviation of a function of pairs on a grid: the root mean square error of its mean."""
    rows = PatchLayout.full(1, grid)
    here, extent = torch.arange(rows.row.shape[1]), rows.extent()[0]
    total = torch.zeros(2, dtype=torch.float64)
    for i in here:  # a row at a time: pairs are many
        value = function(rows.row[0, i], rows.col[0, i], rows.row[0], rows.col[0], extent).double()
        total += torch.stack((value.sum(), value.square().sum()))
    mean, square = (total / len(here) ** 2).tolist()
    return math.sqrt(max(square - mean**2, 0.0))
