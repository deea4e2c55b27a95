"""Batches whose order is a pure function of the seed and the iteration."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from relvit_d2.engine.randomness import generator, sequence, torch_generator
from relvit_d2.errors import UserError

Key = tuple[int, int]  # epoch, index


class EndlessOrder(Sampler[list[Key]]):
    """The batches of one process from an iteration on, without end.

    The samples are an endless row of permutations, one an epoch, each a function of ``(seed, epoch)``; iteration i
    takes positions ``i * batch`` to ``(i + 1) * batch``, and each process an equal run of them. A batch may reach
    over the end of an epoch, so that nothing is dropped and nothing pauses.

    Args:
        count: number of samples.
        batch: samples an iteration, all processes together; a multiple of ``world``.
        seed: the run's seed.
        start: first iteration.
        rank, world: number of this process and of processes.
    """

    def __init__(self, count: int, batch: int, seed: int, start: int, rank: int = 0, world: int = 1) -> None:
        self._count, self._batch, self._seed, self._start = count, batch, seed, start
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[list[Key]]:
        share = self._batch // self._world
        position = self._start * self._batch + self._rank * share
        epoch, order = -1, np.empty(0, np.int64)
        while True:
            keys = []
            for place in range(position, position + share):
                if place // self._count != epoch:
                    epoch = place // self._count
                    order = generator(self._seed, "order", epoch).permutation(self._count)
                keys.append((epoch, int(order[place % self._count])))
            yield keys
            position += self._batch


class _Mapped(Dataset[Any]):
    """Samples through a mapper, with generators seeded for each; a fault comes back as the sample."""

    def __init__(self, samples: Sequence[Any], mapper: Callable[[Any], Any], seed: int) -> None:
        self._samples, self._mapper, self._seed = samples, mapper, seed

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key | int) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        # Detectron2's augmentations draw from the global NumPy generator.
        words = sequence(self._seed, "sample", epoch, index).generate_state(2)
        np.random.seed(words[0])
        random.seed(int(words[1]))
        try:
            return self._mapper(self._samples[index])
        except UserError as error:
            # An exception that crosses a worker's boundary arrives with its traceback as its message.
            return error


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list[Any]) -> Any:
        return next((item for item in items if isinstance(item, UserError)), None) or self._collate(items)


class Batches:
    """A loader's batches; a fault that a worker met is raised in the main process as the :class:`UserError` it is."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def endless_batches(
    samples: Sequence[Any],
    mapper: Callable[[Any], Any],
    collate: Callable[[list[Any]], Any],
    order: EndlessOrder,
    seed: int,
    workers: int,
) -> Batches:
    """Return the endless batches of one process.

    Args:
        samples: what the mapper takes, one a sample.
        mapper: sample -> item; its random draws must come from the global NumPy or Python generator.
        collate: list of items -> batch.
        order: which samples, when.
        seed: the run's seed.
        workers: loader processes; 0 reads in this process. The batches are the same for any number.
    """
    dataset = _Mapped(samples, mapper, seed)
    # A loader draws a seed when it starts: from its own generator, lest the first iteration's draws shift.
    own = torch_generator(seed, "loader")
    return Batches(
        DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=_Collate(collate), generator=own)
    )


def ordered_batches(
    samples: Sequence[Any],
    mapper: Callable[[Any], Any],
    collate: Callable[[list[Any]], Any],
    batch: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Return one process's share of the samples in their order, each sample in exactly one process."""
    share = np.array_split(np.arange(len(samples)), world)[rank].tolist()
    batches = [share[i : i + batch] for i in range(0, len(share), batch)]
    dataset = _Mapped(samples, mapper, seed=0)
    return Batches(DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=_Collate(collate)))
