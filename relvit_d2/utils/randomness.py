"""Every random draw as a function of the seed, its purpose and its place in the run.

No generator state is ever saved: a resumed run asks for the same (seed, purpose, place) and draws
what the straight run would have drawn, whatever the number of loader workers.
"""

import random
import zlib

import numpy as np
import torch
from torch import Tensor

from relvit_d2.utils.hashing import hashed_words


def sequence(seed: int, purpose: str, *place: int) -> np.random.SeedSequence:
    """Return the seed sequence of a draw.

    Args:
        seed: the run's seed, at least 0.
        purpose: what is drawn ("order", "sample", "iteration", ...); purposes are independent of each other.
        place: non-negative integers such as the epoch, the index or the iteration and rank.
    """
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *place])


def generator(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """Return a NumPy generator of its own for a draw; arguments as for :func:`sequence`."""
    return np.random.Generator(np.random.Philox(sequence(seed, purpose, *place)))


def subset_order(seed: int, count: int) -> np.ndarray:
    """Return the numbers 0 to ``count - 1`` in the order in which ``seed`` draws them into a subset, ``(count,)``."""
    return generator(seed, "subset").permutation(count)


def torch_generator(seed: int, purpose: str, *place: int) -> torch.Generator:
    """Return a CPU torch generator of its own for a draw; arguments as for :func:`sequence`."""
    state = int(sequence(seed, purpose, *place).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(state)


def image_keys(seed: int, purpose: str, *place: Tensor | int) -> Tensor:
    """Return what the random choices for each image are hashed from (:mod:`relvit_d2.utils.hashing`).

    Args:
        seed, purpose: as for :func:`sequence`.
        place: integers such as ``(B,)`` epochs and ``(B,)`` indices of images, which broadcast.

    Returns:
        ``(B,)`` int64 in 0..2**32 - 1, different for different values of the last of ``place``.
    """
    return hashed_words(int(sequence(seed, purpose).generate_state(1)[0]), *place)


def seed_everything(seed: int, purpose: str, *place: int) -> None:
    """Seed the global generators of torch (all devices), NumPy and Python; arguments as for :func:`sequence`."""
    words = sequence(seed, purpose, *place).generate_state(3, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[1] & np.uint64(0xFFFFFFFF)))
    random.seed(int(words[2]))
