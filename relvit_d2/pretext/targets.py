"""Targets as pure functions of a layout, and what guessing from their frequencies would score."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from relvit_d2.pretext.layout import PatchLayout

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


def relation_class(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor) -> Tensor:
    """Class of where a token lies as seen from another: ``3*(sgn(dr)+1) + (sgn(dc)+1)``, int64 0..8.

    ``dr`` and ``dc`` are the first token's coordinates minus the other's; the four int64 arguments
    broadcast. The orientation is that of the authors' matrix after its final transpose, where entry
    ``[i, j]`` tells where i is relative to j (authors' code, datasets/encode_locations.py:121-128,165).
    """
    return torch.sign(row - other_row).mul_(3).add_(4) + torch.sign(col - other_col)


def relation_classes(layout: PatchLayout) -> Tensor:
    """Return the dense ``(B, N, N)`` classes: ``[b, i, j]`` is where token i lies as seen from token j.

    Meant for pictures and small grids; :func:`relvit_d2.pretext.relation_loss.relation_loss` forms the
    same classes block by block. Pairs with an invalid token have a class too: mask them where it matters.
    """
    row, col = layout.row, layout.col
    return relation_class(row[:, :, None], col[:, :, None], row[:, None, :], col[:, None, :])


def positions(layout: PatchLayout) -> Tensor:
    """Return the ``(B, N)`` int64 grid cell of each token, ``row * w + col``, 0..h*w-1."""
    return layout.row * layout.grid[1] + layout.col


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
