"""Counter-based random numbers: functions of integer keys that do not depend on device or batch."""

import torch
from torch import Tensor

_WORD = 2**32 - 1


def hashed_words(*keys: Tensor | int) -> Tensor:
    """Hash integer keys, which broadcast, to int64 numbers in 0..2**32 - 1.

    Chains a 32-bit mixing function, "lowbias32" of Chris Wellons (hash-prospector). It is a bijection of 32-bit words,
    so different values of the last key give different numbers.
    """
    state: Tensor | int = 0
    for key in keys:
        state = _mix(torch.as_tensor(key) + state)
    assert isinstance(state, Tensor)
    return state


def hashed_uniform(*keys: Tensor | int) -> Tensor:
    """Hash integer keys, which broadcast, to float32 numbers in [0, 1).

    They are multiples of 2**-24, so that the product with an integer ``n`` rounds to less than ``n``.
    """
    return (hashed_words(*keys) >> 8).to(torch.float32) * 2.0**-24  # 24 bits are exact in float32


def _mix(word: Tensor) -> Tensor:
    word = (word.long() + 0x9E3779B9).bitwise_and_(_WORD)  # zero is a fixed point of the mixing
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word.bitwise_xor_(word >> shift).mul_(factor).bitwise_and_(_WORD)
    return word.bitwise_xor_(word >> 16)
