"""Data loaders whose batches are a pure function of the seed and the iteration."""

import atexit
import itertools
import logging
import random
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import numpy as np

from relvit_d2.data.images.decode import UnreadableImageError
from relvit_d2.data.workers import read_in_workers
from relvit_d2.utils.errors import UserError, defect, resource_error
from relvit_d2.utils.randomness import generator, sequence

Key = tuple[int, int]  # number that seeds the sample's random draws, index

MAX_REPLACEMENTS = 16  # samples that are tried, beginning with the unreadable one

logger = logging.getLogger(__name__)

_open: WeakSet[Generator[Any, None, None]] = WeakSet()  # generators in use


class EndlessOrder:
    """Samples the endless batches of one process from an iteration on.

    The samples are a sequence of permutations, one per epoch, each a function of ``(seed, epoch)``. Iteration i takes
    positions ``i * batch`` to ``(i + 1) * batch``, and each process an equal contiguous part of them. A batch may
    contain samples of two epochs, so that no sample is dropped. With ``repeats``, an epoch contains each sample as
    often as its factor, stochastically rounded (as Detectron2's ``RepeatFactorTrainingSampler``).

    Args:
        batch: samples per iteration of all processes and parts together; a multiple of ``world * parts``.
        start: first iteration.
        rank, world: index of this process and number of processes.
        parts: batches per iteration and process (gradient accumulation).
        repeats: ``(count,)`` how often an epoch contains each sample, at least 1; None: once.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        seed: int,
        start: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        repeats: np.ndarray | None = None,
    ) -> None:
        self._count, self._batch, self._seed, self.start = count, batch, seed, start
        self._rank, self._world, self.parts = rank, world, parts
        self._repeats = repeats
        self._starts = [0]  # first positions of the epochs, with repeats
        self._latest: dict[int, np.ndarray] = {}  # samples of the last epochs, with repeats

    def __iter__(self) -> Iterator[list[Key]]:
        for iteration in itertools.count(self.start):
            keys = self.keys(iteration)
            size = len(keys) // self.parts
            for part in range(self.parts):
                yield keys[part * size : (part + 1) * size]

    def keys(self, iteration: int) -> list[Key]:
        """Return the keys of this process's samples in an iteration.

        They seed the draws by the epoch or, with repeats, by the position, since an epoch may repeat a sample.
        """
        size = self._batch // self._world
        start = iteration * self._batch + self._rank * size
        if self._repeats is not None:
            return [(position, self._repeated(position)) for position in range(start, start + size)]
        samples = (divmod(position, self._count) for position in range(start, start + size))
        return [(epoch, int(_permutation(self._count, self._seed, epoch)[rest])) for epoch, rest in samples]

    def _repeated(self, position: int) -> int:
        """Return the sample at a position of the endless sequence with repeats."""
        while position >= self._starts[-1]:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, position) - 1
        return int(self._epoch(epoch)[position - self._starts[epoch]])

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._latest:
            assert self._repeats is not None
            random = generator(self._seed, "order", epoch)
            counts = np.floor(self._repeats + random.random(self._count)).astype(np.int64)
            kept = {number: samples for number, samples in self._latest.items() if number == epoch - 1}
            self._latest = kept | {epoch: random.permutation(np.arange(self._count).repeat(counts))}
        return self._latest[epoch]


@lru_cache(maxsize=2)  # a batch may contain samples of two epochs
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)


class Batches:
    """The batches of one process, read by worker processes, which do not affect them.

    Args:
        samples: inputs of the mapper.
        mapper: sample -> item; its random draws must come from the global NumPy or Python generator, which is seeded
            for each sample.
        collate: list of items -> batch.
        keys: the samples of each batch, an :class:`EndlessOrder` or a list.
        workers: number of processes; 0: this process reads.
        timeout: seconds to wait for a worker; 0: no limit.
        replaces: replace an unreadable image by the next readable sample, so that a run remains a function of its seed
            and its images.
        leaves_out: leave an unreadable image out of its batch. Without both it is an error.

    Attributes:
        used: indices of the samples of the last batch, without unreadable ones.
        unreadable: indices of the unreadable samples of all batches so far.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        mapper: Callable[[Any], Any],
        collate: Callable[[list[Any]], Any],
        keys: Any,
        seed: int,
        workers: int,
        timeout: float = 0,
        replaces: bool = False,
        leaves_out: bool = False,
    ) -> None:
        self._samples, self._mapper, self._collate, self.keys = samples, mapper, collate, keys
        self._seed, self._workers, self._timeout = seed, workers, timeout
        self._tried = MAX_REPLACEMENTS if replaces else 0 if leaves_out else 1  # beginning with the unreadable sample
        self._reported: set[int] = set()
        self.used: list[int] = []
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Generator[Any, None, None]:
        if not self._workers:
            return self._checked(self._batch(keys) for keys in self.keys)
        batches = self._checked(read_in_workers(self._batch, self.keys, self._workers, self._timeout))
        _open.add(batches)
        return batches

    def _checked(self, results: Generator[tuple[Any, list[int], list[int]], None, None]) -> Generator[Any, None, None]:
        """Yield the batches, except for those whose samples are all left out."""
        with closing(results):
            for batch, self.used, unreadable in results:
                self.unreadable.update(unreadable)
                if self.used:
                    yield batch

    @property
    def replaced(self) -> list[str]:
        """Files of the unreadable images so far."""
        return [_file(self._samples[index]) for index in sorted(self.unreadable)]

    def names(self, iteration: int) -> list[Any]:
        """Return names of the images of an iteration, for messages: the file, and for a record the image's id."""
        return [_name(self._samples[index]) for _, index in self.keys.keys(iteration)]

    def _batch(self, keys: list[Key]) -> tuple[Any, list[int], list[int]]:
        """Return the batch, the indices of its samples, and the indices of unreadable ones."""
        unreadable: list[int] = []
        read = [found for key in keys if (found := self._read(*key, unreadable))]
        batch = self._collate([item for _, item in read]) if read else None
        return batch, [index for index, _ in read], unreadable

    def _read(self, epoch: int, index: int, unreadable: list[int]) -> tuple[int, Any] | None:
        """Return the index of the sample that is read, and its item; None if it is left out."""
        # Detectron2's augmentations draw from the global NumPy generator.
        seeds = sequence(self._seed, "sample", epoch, index).generate_state(2)
        np.random.seed(seeds[0])
        random.seed(int(seeds[1]))
        for candidate in range(index, index + max(self._tried, 1)):
            position = candidate % len(self._samples)
            sample = self._samples[position]
            try:
                return position, self._mapper(sample)
            except UnreadableImageError as error:
                last = error
                unreadable.append(position)
                self._report(position, error)
            except UserError:
                raise
            except Exception as error:
                raise resource_error(error) or defect(f"reading {_name(sample)}", error) from error
        if not self._tried:
            return None
        raise last

    def _report(self, index: int, error: UnreadableImageError) -> None:
        if self._tried != 1 and index not in self._reported:
            self._reported.add(index)
            count = len(self._reported)
            how, done = ("the next image replaces it", "replaced") if self._tried else ("it is left out", "left out")
            logger.warning(f"{error}; {how} ({count} {done} so far in this process)")


def _file(sample: Any) -> str:
    return str(sample["file_name"] if isinstance(sample, dict) else sample)


def _name(sample: Any) -> Any:
    return {key: sample[key] for key in ("file_name", "image_id")} if isinstance(sample, dict) else str(sample)


@atexit.register
def _close() -> None:
    """Stop the workers before Python exits and waits for them, since they ignore SIGTERM."""
    for batches in list(_open):
        batches.close()


def ordered_batches(
    samples: Sequence[Any],
    mapper: Callable[[Any], Any],
    collate: Callable[[list[Any]], Any],
    batch: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    timeout: float = 0,
    leaves_out: bool = False,
) -> Batches:
    """Return one process's part of the samples in order; each sample is in exactly one process's part.

    ``timeout`` and ``leaves_out`` as in :class:`Batches`.
    """
    share = np.array_split(np.arange(len(samples)), world)[rank].tolist()
    keys = [[(0, index) for index in share[i : i + batch]] for i in range(0, len(share), batch)]
    return Batches(samples, mapper, collate, keys, 0, workers, timeout, leaves_out=leaves_out)
