"""Floating-point precision of the forward pass."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from relvit_d2.utils.errors import UserError


@dataclass(frozen=True)
class Precision:
    """A precision and the reason for its choice.

    Attributes:
        dtype: ``torch.float32``, ``torch.bfloat16`` or ``torch.float16``.
        reason: for the log.
        device: device of the model.
    """

    dtype: torch.dtype
    reason: str
    device: torch.device

    @property
    def name(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast context of a forward pass, disabled for float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if enabled else torch.bfloat16, enabled=enabled)


def choose_precision(setting: str, device: torch.device) -> Precision:
    """Choose the precision for ``SOLVER.PRECISION``.

    ``auto`` is bfloat16 if the GPU, or the processor (AMX or AVX512-BF16), supports it natively; elsewhere bfloat16 is
    several times slower than float32. Other GPUs from compute capability 7.0 on (V100, T4, RTX 20), the first with
    tensor cores, use float16.

    Raises:
        UserError: the setting is unknown.
    """
    if setting in ("float32", "bfloat16", "float16"):
        return Precision(getattr(torch, setting), "SOLVER.PRECISION", device)
    if setting != "auto":
        raise UserError(f"SOLVER.PRECISION '{setting}' is unknown; give auto, float32, bfloat16 or float16")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "the GPU supports bfloat16", device)
        if torch.cuda.get_device_capability(device) >= (7, 0):
            return Precision(torch.float16, "the GPU does not support bfloat16", device)
        return Precision(torch.float32, "the GPU has no tensor cores", device)
    if device.type == "cpu":
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return Precision(torch.bfloat16, "the processor supports bfloat16", device)
        return Precision(torch.float32, "the processor does not support bfloat16", device)
    return Precision(torch.float32, f"bfloat16 is not tested on {device.type}", device)
