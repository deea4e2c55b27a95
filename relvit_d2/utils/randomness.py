"""Random generators as functions of the seed, the purpose and a counter, such as the iteration.

No generator state is saved: a resumed run uses the same (seed, purpose, counters) as an uninterrupted one, for any
number of loader workers.
"""

import random
import zlib

import numpy as np
import torch
from torch import Tensor

from relvit_d2.utils.hashing import hashed_words


def sequence(seed: int, purpose: str, *counters: int) -> np.random.SeedSequence:
    """Return a seed sequence.

    Args:
        seed: seed of the run, 0 or more.
        purpose: purpose of the numbers ("order", "sample", "iteration", ...); purposes are independent.
        counters: non-negative integers such as epoch, index, iteration and rank.
    """
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *counters])


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return a NumPy generator; arguments as for :func:`sequence`."""
    return np.random.Generator(np.random.Philox(sequence(seed, purpose, *counters)))


def subset_order(seed: int, count: int) -> np.ndarray:
    """Return the indices 0 to ``count - 1`` in the random order in which subsets take them, ``(count,)``."""
    return generator(seed, "subset").permutation(count)


def image_keys(seed: int, purpose: str, *counters: Tensor | int) -> Tensor:
    """Return the keys of the random numbers of images (:mod:`relvit_d2.utils.hashing`).

    Args:
        seed, purpose: as for :func:`sequence`.
        counters: integers, such as epochs ``(B,)`` and image indices ``(B,)``, which broadcast.

    Returns:
        ``(B,)`` int64 in 0..2**32 - 1, different for different values of the last counter.
    """
    return hashed_words(int(sequence(seed, purpose).generate_state(1)[0]), *counters)


def seed_everything(seed: int, purpose: str, *counters: int) -> None:
    """Seed the global generators of torch (all devices), NumPy and Python; arguments as for :func:`sequence`."""
    words = sequence(seed, purpose, *counters).generate_state(3, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[1] & np.uint64(0xFFFFFFFF)))
    random.seed(int(words[2]))
