"""Random numbers that are a function of integer keys: the same on every device and however the work is divided."""

import torch
from torch import Tensor

_WORD = 2**32 - 1


def hashed_words(*keys: Tensor | int) -> Tensor:
    """Return one int64 number in 0..2**32 - 1 for each combination of the integer keys, which broadcast.

    A chain of 32-bit mixing steps (the finaliser "lowbias32" of Chris Wellons, hash-prospector, with its constants).
    Each step is a bijection of 32-bit words: different values of the last key give different numbers.
    """
    state: Tensor | int = 0
    for key in keys:
        state = _mix(torch.as_tensor(key) + state)
    assert isinstance(state, Tensor)
    return state


def hashed_uniform(*keys: Tensor | int) -> Tensor:
    """Return float32 numbers in [0, 1), one for each combination of the integer keys, which broadcast.

    They are multiples of 2**-24, so that ``n`` times such a number rounds to less than ``n``.
    """
    return (hashed_words(*keys) >> 8).to(torch.float32) * 2.0**-24  # 24 bits are exact in float32


def _mix(word: Tensor) -> Tensor:
    word = (word.long() + 0x9E3779B9).bitwise_and_(_WORD)  # zero is a fixed point of what follows
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word.bitwise_xor_(word >> shift).mul_(factor).bitwise_and_(_WORD)
    return word.bitwise_xor_(word >> 16)
