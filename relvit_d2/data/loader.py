"""Data loaders whose batches are a pure function of the seed and the iteration."""

import atexit
import itertools
import logging
import random
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import numpy as np
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, Dataset, Sampler

from relvit_d2.data.images.decode import UnreadableImageError
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.randomness import generator, sequence, torch_generator

Key = tuple[int, int]  # epoch, index

MAX_REPLACEMENTS = 16  # samples that are tried, beginning with the unreadable one

logger = logging.getLogger(__name__)

_open: WeakSet[Generator[Any, None, None]] = WeakSet()  # generators in use


class EndlessOrder(Sampler[list[Key]]):
    """Samples the endless batches of one process from an iteration on.

    The samples are a sequence of permutations, one per epoch, each a function of ``(seed, epoch)``. Iteration i takes
    positions ``i * batch`` to ``(i + 1) * batch``, and each process an equal contiguous part of them. A batch may
    contain samples of two epochs, so that no sample is dropped.

    Args:
        count: number of samples.
        batch: samples per iteration of all processes and parts together; a multiple of ``world * parts``.
        seed: the run's seed.
        start: first iteration.
        rank, world: index of this process and number of processes.
        parts: batches per iteration and process (gradient accumulation).
    """

    def __init__(
        self, count: int, batch: int, seed: int, start: int, rank: int = 0, world: int = 1, parts: int = 1
    ) -> None:
        self._count, self._batch, self._seed, self.start = count, batch, seed, start
        self._rank, self._world, self.parts = rank, world, parts

    def __iter__(self) -> Iterator[list[Key]]:
        for iteration in itertools.count(self.start):
            keys = self.keys(iteration)
            size = len(keys) // self.parts
            for part in range(self.parts):
                yield keys[part * size : (part + 1) * size]

    def keys(self, iteration: int) -> list[Key]:
        """Return the epochs and indices of this process's samples in an iteration."""
        size = self._batch // self._world
        start = iteration * self._batch + self._rank * size
        samples = (divmod(position, self._count) for position in range(start, start + size))
        return [(epoch, int(_permutation(self._count, self._seed, epoch)[rest])) for epoch, rest in samples]


@lru_cache(maxsize=2)  # a batch may contain samples of two epochs
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)


class _Mapped(Dataset[Any]):
    """Maps samples with the global generators seeded for each; a :class:`UserError` is returned as the sample.

    With ``replaces``, an unreadable image is replaced by the next readable sample, so that a run remains a function of
    its seed and its images.
    """

    def __init__(self, samples: Sequence[Any], mapper: Callable[[Any], Any], seed: int, replaces: bool) -> None:
        self._samples, self._mapper, self._seed, self._replaces = samples, mapper, seed, replaces
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key | int) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        # Detectron2's augmentations draw from the global NumPy generator.
        seeds = sequence(self._seed, "sample", epoch, index).generate_state(2)
        np.random.seed(seeds[0])
        random.seed(int(seeds[1]))
        for candidate in range(index, index + (MAX_REPLACEMENTS if self._replaces else 1)):
            try:
                return self._mapper(self._samples[candidate % len(self)])
            except UnreadableImageError as error:
                user_error: UserError = error
                self._report(candidate % len(self), error)
            except UserError as error:
                user_error = error
                break
        # An exception raised in a worker would arrive with the traceback as its message.
        return user_error

    def _report(self, index: int, error: UnreadableImageError) -> None:
        if self._replaces and index not in self._reported:
            self._reported.add(index)
            count = len(self._reported)
            logger.warning(f"{error}; the next image replaces it ({count} replaced so far in this process)")


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list[Any]) -> Any:
        return next((item for item in items if isinstance(item, UserError)), None) or self._collate(items)


class Batches:
    """A loader's batches; a :class:`UserError` of a worker is raised in the main process.

    Attributes:
        first: index of the first sample, if the samples are read in order.
    """

    def __init__(self, loader: DataLoader[Any], first: int = 0) -> None:
        self._loader, self.first = loader, first

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Generator[Any, None, None]:
        batches = self._read()
        _open.add(batches)
        return batches

    def _read(self) -> Generator[Any, None, None]:
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


class EndlessBatches(Batches):
    """The endless batches of one process.

    Args:
        samples: inputs of the mapper.
        mapper: sample -> item; its random draws must come from the global NumPy or Python generator.
        collate: list of items -> batch.
        order: the samples of each batch.
        seed: the run's seed.
        workers: number of loader processes; 0 reads in this process. The batches do not depend on it.
        replaces: replace an unreadable image by the next one.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        mapper: Callable[[Any], Any],
        collate: Callable[[list[Any]], Any],
        order: EndlessOrder,
        seed: int,
        workers: int,
        replaces: bool = False,
    ) -> None:
        self._samples, self._order = samples, order
        dataset = _Mapped(samples, mapper, seed, replaces)
        # A loader draws a seed when it starts, which must not advance the global generator.
        generator = torch_generator(seed, "loader")
        super().__init__(_loader(dataset, order, collate, workers, generator=generator))

    def names(self, iteration: int) -> list[Any]:
        """Return names of the images of an iteration, for messages: the file, and for a record the image's id."""
        samples = [self._samples[index] for _, index in self._order.keys(iteration)]
        return [{k: s[k] for k in ("file_name", "image_id")} if isinstance(s, dict) else str(s) for s in samples]


def _loader(
    dataset: Dataset[Any], order: Any, collate: Callable[[list[Any]], Any], workers: int, **more: Any
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_Collate(collate),
        worker_init_fn=_start_worker,
        **more,
    )


def _start_worker(number: int) -> None:
    """Ignore Ctrl-C and Slurm's SIGTERM, which reach every process of a run; end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)


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
    replaces: bool = False,
) -> Batches:
    """Return one process's part of the samples in order; each sample is in exactly one process's part.

    With ``replaces`` an unreadable image is replaced by the next one.
    """
    share = np.array_split(np.arange(len(samples)), world)[rank].tolist()
    batches = [share[i : i + batch] for i in range(0, len(share), batch)]
    dataset = _Mapped(samples, mapper, 0, replaces)
    return Batches(_loader(dataset, batches, collate, workers), share[0] if share else 0)
