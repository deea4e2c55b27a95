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
    """

    grid: tuple[int, int]
    row: Tensor
    col: Tensor
    valid: Tensor

    @classmethod
    def padded(cls, grid: tuple[int, int], extent: Tensor) -> "PatchLayout":
        """Lay out images in row-major order on a common grid; tokens outside an image's grid are invalid.

        Args:
            grid: rows and columns of the common grid.
            extent: ``(B, 2)`` integer rows and columns of each image, not larger than ``grid``.
        """
        layout = cls.full(len(extent), grid, extent.device)
        return replace(layout, valid=(layout.row < extent[:, :1]) & (layout.col < extent[:, 1:]))

    @classmethod
    def full(cls, batch: int, grid: tuple[int, int], device: torch.device | str = "cpu") -> "PatchLayout":
        """Lay out ``batch`` unpadded images in row-major order: N = h * w valid tokens each."""
        height, width = grid
        cell = torch.arange(height * width, device=device).expand(batch, -1)
        return cls(grid, cell // width, cell % width, torch.ones_like(cell, dtype=torch.bool))

    def extent(self) -> Tensor:
        """Return each image's rows and columns without padding, ``(B, 2)`` int64; 1 x 1 without valid tokens."""
        rows, cols = (x.masked_fill(~self.valid, 0).amax(1) + 1 for x in (self.row, self.col))
        return torch.stack((rows, cols), 1)

    def permuted(self, order: Tensor) -> "PatchLayout":
        """Move the token at index ``order[b, i]`` to index ``i``.

        Args:
            order: ``(B, N)`` int64, a permutation of 0..N-1 in each row.
        """
        return PatchLayout(self.grid, self.row.gather(1, order), self.col.gather(1, order), self.valid.gather(1, order))
