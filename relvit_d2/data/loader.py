"""Batches whose order is a pure function of the seed and the iteration."""

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

TRIES = 16  # samples that are tried in place of one that cannot be read

logger = logging.getLogger(__name__)

_open: WeakSet[Generator[Any, None, None]] = WeakSet()  # what reads batches now


class EndlessOrder(Sampler[list[Key]]):
    """The batches of one process from an iteration on, without end.

    The samples are an endless row of permutations, one an epoch, each a function of ``(seed, epoch)``; iteration i
    takes positions ``i * batch`` to ``(i + 1) * batch``, and each process an equal run of them. A batch may reach
    over the end of an epoch, so that nothing is dropped and nothing pauses.

    Args:
        count: number of samples.
        batch: samples an iteration, all processes and parts together; a multiple of ``world * parts``.
        seed: the run's seed.
        start: first iteration.
        rank, world: number of this process and of processes.
        parts: batches that each process reads an iteration, one after the other.
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
        share = self._batch // self._world
        position = iteration * self._batch + self._rank * share
        return [self._key(place) for place in range(position, position + share)]

    def _key(self, place: int) -> Key:
        epoch, rest = divmod(place, self._count)
        return epoch, int(_permutation(self._count, self._seed, epoch)[rest])


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)


class _Mapped(Dataset[Any]):
    """Samples through a mapper, with generators seeded for each; a fault comes back as the sample.

    Where ``replaces``, the next sample that can be read stands in for an image that cannot: what a run learns stays a
    function of its seed and its images.
    """

    def __init__(self, samples: Sequence[Any], mapper: Callable[[Any], Any], seed: int, replaces: bool) -> None:
        self._samples, self._mapper, self._seed, self._replaces = samples, mapper, seed, replaces
        self._said: set[int] = set()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key | int) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        # Detectron2's augmentations draw from the global NumPy generator.
        words = sequence(self._seed, "sample", epoch, index).generate_state(2)
        np.random.seed(words[0])
        random.seed(int(words[1]))
        for place in range(index, index + (TRIES if self._replaces else 1)):
            try:
                return self._mapper(self._samples[place % len(self)])
            except UnreadableImageError as error:
                fault: UserError = error
                self._say(place % len(self), error)
            except UserError as error:
                fault = error
                break
        # An exception that crosses a worker's boundary arrives with its traceback as its message.
        return fault

    def _say(self, index: int, error: UnreadableImageError) -> None:
        if self._replaces and index not in self._said:
            self._said.add(index)
            logger.warning(f"{error}; until then the next image stands in for it ({len(self._said)} such here so far)")


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list[Any]) -> Any:
        return next((item for item in items if isinstance(item, UserError)), None) or self._collate(items)


class Batches:
    """A loader's batches; a fault that a worker met is raised in the main process as the :class:`UserError` it is.

    Attributes:
        first: number of the first sample, of those that are read in order.
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
        samples: what the mapper takes, one a sample.
        mapper: sample -> item; its random draws must come from the global NumPy or Python generator.
        collate: list of items -> batch.
        order: which samples, when.
        seed: the run's seed.
        workers: loader processes; 0 reads in this process. The batches are the same for any number.
        replaces: let the next image stand in for one that cannot be read.
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
        # A loader draws a seed when it starts: from its own generator, lest the first iteration's draws shift.
        own = torch_generator(seed, "loader")
        super().__init__(_loader(dataset, order, collate, workers, generator=own))

    def names(self, iteration: int) -> list[Any]:
        """Return what names the images of an iteration: the file, for a record the image's id too."""
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
    """Die with the parent, but not before it: Ctrl-C and Slurm's SIGTERM reach every process of a run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)


@atexit.register
def _close() -> None:
    """Let the workers go before Python, at its end, waits for them after a SIGTERM that they ignore."""
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
    """Return one process's share of the samples in their order, each sample in exactly one process.

    With ``replaces`` the next image stands in for one that cannot be read.
    """
    share = np.array_split(np.arange(len(samples)), world)[rank].tolist()
    batches = [share[i : i + batch] for i in range(0, len(share), batch)]
    dataset = _Mapped(samples, mapper, 0, replaces)
    return Batches(_loader(dataset, batches, collate, workers), share[0] if share else 0)
