"""The interface between trainer and data."""

from collections.abc import Generator
from typing import Any, Protocol


class BatchSource(Protocol):
    """Endless source of batches, in ``SOLVER.GRAD_ACCUM_STEPS`` parts per iteration."""

    def __iter__(self) -> Generator[Any, None, None]: ...

    @property
    def replaced(self) -> list[str]:
        """Files that this process could not read so far, and replaced."""
        ...

    def names(self, iteration: int) -> list[Any]:
        """Return the names of this process's images in an iteration, plain values."""
        ...
