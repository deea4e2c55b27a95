"""Encoders that consist of equal blocks over one sequence of tokens."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relvit_d2.encoders.base import Encoder
from relvit_d2.encoders.windowed import global_block, windowed_block
from relvit_d2.utils.errors import UserError


def evenly_spaced(count: int, depth: int) -> list[int]:
    """Return the indices of ``count`` of ``depth`` blocks, evenly spaced up to the last one."""
    return [depth * (i + 1) // count - 1 for i in range(count)]


class PlainEncoder(Encoder):
    """Plain transformer: a map of each selected block, by default of the last one, after the final norm.

    A subclass implements :meth:`embed` and the properties.

    Args:
        stride: pixels per token.
        dim: channels of a token.
    """

    def __init__(self, stride: int, dim: int) -> None:
        super().__init__()
        self.strides, self.channels = {f"s{stride}": stride}, {f"s{stride}": dim}
        self._selected: list[int] = []  # blocks before the last one whose outputs are maps
        # Side in patches of the attention windows, by block, 0: one window; other blocks run as they are.
        self._windows: dict[int, int] = {}
        self._recomputes = False

    @property
    def sequence_blocks(self) -> nn.Sequential | nn.ModuleList:
        """The blocks, in order."""
        raise NotImplementedError

    @property
    def final_norm(self) -> nn.Module:
        """The norm that follows the last block."""
        raise NotImplementedError

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches, such as a class token."""
        raise NotImplementedError

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        return True

    def embed(self, images: Tensor) -> Tensor:
        """Embed images ``(B, in_chans, H, W)`` as ``(B, prefix + h * w, C)``, with prefix and positions."""
        raise NotImplementedError

    def block_functions(self, grid: tuple[int, int], kept: Tensor | None) -> list[Callable[[Tensor], Tensor]]:
        """Return the function of each block, which maps tokens ``(B, prefix + N, C)`` to tokens of the same shape.

        Args:
            grid: rows and columns of patches of the image.
            kept: indices of the patches, see :meth:`tokens`; None: all patches.
        """
        functions: list[Callable[[Tensor], Tensor]] = []
        for index, block in enumerate(self.sequence_blocks):
            window = self._windows.get(index)
            functions.append(
                partial(global_block, block)
                if window is None
                else partial(windowed_block, block, grid=grid, window=window)
            )
        return functions

    def forward_blocks(self, x: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> list[Tensor]:
        """Run embedded tokens ``(B, prefix + N, C)`` through the blocks; see :meth:`block_functions`.

        Returns:
            The normed outputs of the selected blocks and of the last one, shaped like ``x``.
        """
        outputs = []
        for index, run in enumerate(self.block_functions(grid, kept)):
            x = checkpoint(run, x, use_reentrant=False) if self._recomputes else run(x)
            if index in self._selected:
                outputs.append(self.final_norm(x))
        return [*outputs, self.final_norm(x)]

    @property
    def supports_subsets(self) -> bool:
        """Whether no block has windows or relative positions, which need the whole grid."""
        return not self._windows

    def _sequences(self, images: Tensor, kept: Tensor | None = None) -> list[Tensor]:
        x = self.embed(images)
        if kept is not None:
            patches = x[:, self.prefix :].gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
            x = torch.cat((x[:, : self.prefix], patches), dim=1)
        return self.forward_blocks(x, self.grid(*images.shape[-2:]), kept)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """As :meth:`Encoder.forward`; a side that is not a multiple of the stride is padded with zeros at its end."""
        grid = self.grid(*images.shape[-2:])
        maps = [x[:, self.prefix :].transpose(1, 2).unflatten(2, grid) for x in self._sequences(images)]
        return dict(zip(self.strides, maps, strict=True))

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        assert kept is None or self.supports_subsets, f"{self.name} needs all tokens"
        return self._sequences(images, kept)[-1][:, self.prefix :]

    def pooled_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        sequence = self._sequences(images)[-1]
        tokens = sequence[:, self.prefix :]
        return sequence[:, 0] if self.has_class_token else tokens.mean(1), tokens

    def select_blocks(self, count: int) -> None:
        if not 1 <= count <= self.depth:
            raise UserError(
                f"{count} levels need as many blocks, but encoder '{self.name}' has {self.depth}: request fewer levels"
            )
        *self._selected, _ = evenly_spaced(count, self.depth)
        names = [*(f"b{index + 1}" for index in self._selected), self.last]
        self.strides = dict.fromkeys(names, self.strides[self.last])
        self.channels = dict.fromkeys(names, self.dim)

    def checkpoint_blocks(self) -> None:
        self._recomputes = True

    def compile_passes(self) -> None:
        """Compile the blocks; the embedding stays eager.

        torch 2.11 fails to compile the gradient of resampled positions once the size of an image may vary.
        """
        self.forward_blocks = torch.compile(self.forward_blocks)  # type: ignore[method-assign]
