"""The true grid positions of the patch tokens of a batch."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PatchLayout:
    """The true grid position of each of the N tokens of B images.

    Attributes:
        grid: rows and columns ``(h, w)`` of the grid.
        row: ``(B, N)`` int64, 0..h-1, counted from the top.
        col: ``(B, N)`` int64, 0..w-1, counted from the left.
        valid: ``(B, N)`` bool, False for padding, which losses ignore.
        extent: ``(B, 2)`` int64, rows and columns of each image without padding, whichever of its tokens are present.
    """

    grid: tuple[int, int]
    row: Tensor
    col: Tensor
    valid: Tensor
    extent: Tensor

    @classmethod
    def padded(cls, grid: tuple[int, int], extent: Tensor) -> "PatchLayout":
        """Lay out images in row-major order on a common grid; tokens outside an image's grid are invalid.

        Args:
            grid: rows and columns of the common grid.
            extent: ``(B, 2)`` int64 rows and columns of each image, not larger than ``grid``.
        """
        layout = cls.full(len(extent), grid, extent.device)
        valid = (layout.row < extent[:, :1]) & (layout.col < extent[:, 1:])
        return replace(layout, valid=valid, extent=extent)

    @classmethod
    def full(cls, batch: int, grid: tuple[int, int], device: torch.device | str = "cpu") -> "PatchLayout":
        """Lay out ``batch`` unpadded images in row-major order: N = h * w valid tokens each."""
        height, width = grid
        cell = torch.arange(height * width, device=device).expand(batch, -1)
        extent = torch.stack([torch.full((batch,), side, device=device) for side in grid], 1)
        return cls(grid, cell // width, cell % width, torch.ones_like(cell, dtype=torch.bool), extent)

    def selected(self, index: Tensor) -> "PatchLayout":
        """Move the token at ``index[b, i]`` to index ``i``; drop the others.

        Args:
            index: ``(B, K)`` int64, different indices of tokens in each row: a permutation if K = N, else a subset.
        """
        row, col, valid = (x.gather(1, index) for x in (self.row, self.col, self.valid))
        return replace(self, row=row, col=col, valid=valid)
