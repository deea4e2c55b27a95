"""Random numbers as a function of what they are for: the same on every device and however the work is cut."""

import torch
from torch import Tensor

_WORD = 2**32 - 1


def hashed_uniform(*keys: Tensor | int) -> Tensor:
    """Return float32 numbers in [0, 1), one for each combination of the integer keys, which broadcast.

    A chain of 32-bit mixing steps (the finaliser "lowbias32" of Chris Wellons, hash-prospector, with its constants).
    """
    state: Tensor | int = 0
    for key in keys:
        state = _mix(torch.as_tensor(key) + state)
    assert isinstance(state, Tensor)
    return (state >> 8).to(torch.float32) * 2.0**-24  # 24 bits are exact in float32


def _mix(word: Tensor) -> Tensor:
    word = ((word + 0x9E3779B9) & _WORD).long()  # zero is a fixed point of what follows
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = ((word ^ (word >> shift)) * factor) & _WORD
    return word ^ (word >> 16)
