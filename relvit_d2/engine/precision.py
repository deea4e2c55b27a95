"""The number format of the forward pass."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from relvit_d2.utils.errors import UserError


@dataclass(frozen=True)
class Precision:
    """A number format and why it was chosen.

    Attributes:
        dtype: ``torch.float32`` or ``torch.bfloat16``.
        reason: half a sentence for the log.
        device: where it applies.
    """

    dtype: torch.dtype
    reason: str
    device: torch.device

    @property
    def name(self) -> str:
        """``float32`` or ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context for a forward pass; it changes nothing in float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if enabled else torch.bfloat16, enabled=enabled)


def choose_precision(setting: str, device: torch.device) -> Precision:
    """Choose the number format for ``SOLVER.PRECISION``.

    ``auto`` takes bfloat16 on a CUDA device that has it and on a processor that multiplies it natively
    (AMX or AVX512-BF16); elsewhere a bfloat16 product is several times slower than a float32 one.

    Raises:
        UserError: for another setting than auto, float32, bfloat16.
    """
    if setting == "float32":
        return Precision(torch.float32, "asked for", device)
    if setting == "bfloat16":
        return Precision(torch.bfloat16, "asked for", device)
    if setting != "auto":
        raise UserError(f"SOLVER.PRECISION '{setting}' is none of auto, float32, bfloat16")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "the GPU multiplies bfloat16 natively", device)
        return Precision(torch.float32, "the GPU has no native bfloat16", device)
    if device.type == "cpu":
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return Precision(torch.bfloat16, "the processor multiplies bfloat16 natively", device)
        return Precision(torch.float32, "the processor has no native bfloat16", device)
    return Precision(torch.float32, f"bfloat16 is not measured on {device.type}", device)
