"""Where every patch token of a batch truly lies: the one thing that views hand to losses."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PatchLayout:
    """The true place of each of the N tokens of B images on a grid of patches.

    Attributes:
        grid: rows and columns ``(h, w)`` of the grid.
        row: ``(B, N)`` int64, 0..h-1, counted from the top.
        col: ``(B, N)`` int64, 0..w-1, counted from the left.
        valid: ``(B, N)`` bool, False for tokens that no loss may look at (padding).
    """

    grid: tuple[int, int]
    row: Tensor
    col: Tensor
    valid: Tensor

    @classmethod
    def full(cls, batch: int, grid: tuple[int, int], device: torch.device | str = "cpu") -> "PatchLayout":
        """Lay out ``batch`` whole images row by row: N = h*w tokens, all valid."""
        height, width = grid
        cell = torch.arange(height * width, device=device).expand(batch, -1)
        return cls(grid, cell // width, cell % width, torch.ones_like(cell, dtype=torch.bool))

    def permuted(self, order: Tensor) -> "PatchLayout":
        """Put the patch that was in slot ``order[b, i]`` into slot ``i``.

        Args:
            order: ``(B, N)`` int64, a permutation of 0..N-1 in each row.
        """
        return PatchLayout(self.grid, self.row.gather(1, order), self.col.gather(1, order), self.valid.gather(1, order))
