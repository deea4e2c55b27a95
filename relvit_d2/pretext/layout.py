"""Where every patch token of a batch truly lies: the one thing that views hand to losses."""

from dataclasses import dataclass, replace

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
    def padded(cls, grid: tuple[int, int], extent: Tensor) -> "PatchLayout":
        """Lay out images row by row on a common grid; tokens beyond an image's own rows and columns are invalid.

        Args:
            grid: rows and columns of the common grid.
            extent: ``(B, 2)`` integer rows and columns of each image, at most the grid's.
        """
        layout = cls.full(len(extent), grid, extent.device)
        return replace(layout, valid=(layout.row < extent[:, :1]) & (layout.col < extent[:, 1:]))

    @classmethod
    def full(cls, batch: int, grid: tuple[int, int], device: torch.device | str = "cpu") -> "PatchLayout":
        """Lay out ``batch`` whole images row by row: N = h*w tokens, all valid."""
        height, width = grid
        cell = torch.arange(height * width, device=device).expand(batch, -1)
        return cls(grid, cell // width, cell % width, torch.ones_like(cell, dtype=torch.bool))

    def extent(self) -> Tensor:
        """Return the rows and columns ``(B, 2)`` int64 of the part of the grid that an image's valid tokens reach.

        Of an image that lies padded on the grid it is the image's own grid; without a valid token it is 1 x 1.
        """
        rows, cols = (x.masked_fill(~self.valid, 0).amax(1) + 1 for x in (self.row, self.col))
        return torch.stack((rows, cols), 1)

    def permuted(self, order: Tensor) -> "PatchLayout":
        """Put the patch that was in slot ``order[b, i]`` into slot ``i``.

        Args:
            order: ``(B, N)`` int64, a permutation of 0..N-1 in each row.
        """
        return PatchLayout(self.grid, self.row.gather(1, order), self.col.gather(1, order), self.valid.gather(1, order))
