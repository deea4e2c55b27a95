"""What the trainer needs of its data."""

from collections.abc import Generator
from typing import Any, Protocol


class BatchSource(Protocol):
    """Endless parts of batches, ``SOLVER.GRAD_ACCUM_STEPS`` an iteration."""

    def __iter__(self) -> Generator[Any, None, None]: ...

    def names(self, iteration: int) -> list[Any]:
        """Return the names of the images of this process in an iteration, plain values."""
        ...
