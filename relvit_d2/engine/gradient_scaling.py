"""Gradient scaling in float16."""

from collections.abc import Collection
from typing import Any

import torch

from relvit_d2.engine.precision import Precision

GRADIENT_NORM = "grad_norm"  # name of the norm of all gradients among the values of an iteration
MIN_SCALE = 1.0  # a smaller scale would make small gradients vanish instead of keeping them
MAX_FAILURES = 10  # successive iterations with a loss that is not finite, after which a run ends


class GradientScaler(torch.amp.GradScaler):
    """torch's ``GradScaler`` in float16, with limits and counts; without effect in other precisions.

    The smallest number of float16 is 6e-8, so small gradients would become 0. The loss is multiplied by a scale before
    the backward pass, and the gradients are divided by it before they are clipped ("Mixed Precision Training",
    Micikevicius et al., 2018, section 3.2). A step whose gradients overflow is skipped and halves the scale; 2,000
    successive steps without overflow double it (torch's defaults).

    Attributes:
        skipped: number of skipped steps.
        failures: number of the last iterations in a row with a loss that is not finite.
    """

    def __init__(self, precision: Precision) -> None:
        super().__init__(precision.device.type, enabled=precision.dtype == torch.float16)
        self.skipped = self.failures = 0

    def tolerates(self, not_finite: Collection[str]) -> bool:
        """Count an iteration before its step; return whether training continues.

        Args:
            not_finite: names of its values that are not finite, equal in all processes.

        Returns:
            Without scaling, whether all are finite. With scaling, False if gradients overflow although the scale is at
            most ``MIN_SCALE``, or if a loss or metric was not finite in ``MAX_FAILURES`` iterations in a row.
        """
        if not self.is_enabled():
            return not not_finite
        overflow = GRADIENT_NORM in not_finite
        self.skipped += overflow
        self.failures = self.failures + 1 if set(not_finite) - {GRADIENT_NORM} else 0
        return self.failures < MAX_FAILURES and not (overflow and self.get_scale() <= MIN_SCALE)

    def metrics(self) -> dict[str, float]:
        """Return the scale of this iteration and the number of skipped steps; empty without scaling."""
        return {"grad_scale": self.get_scale(), "skipped_steps": self.skipped} if self.is_enabled() else {}

    def describe(self) -> str:
        """Return the state for an error message; empty without scaling."""
        if not self.is_enabled():
            return ""
        repeated = f", the {self.failures}th iteration in a row" if self.failures == MAX_FAILURES else ""
        return f" in float16 with a gradient scale of {self.get_scale():g}{repeated}"

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state and the counts, plain values."""
        return super().state_dict() | {"skipped": self.skipped, "failures": self.failures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.skipped, self.failures = state_dict["skipped"], state_dict["failures"]
