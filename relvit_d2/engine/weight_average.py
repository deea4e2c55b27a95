"""Exponential moving average of a model's weights."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

SUFFIX = "_ema"  # of the names of results and files

logger = logging.getLogger(__name__)


class WeightAverage:
    """The moving average of a model's parameters, in float32, and the last values of its buffers.

    Update k is ``average = d * average + (1 - d) * weights`` with ``d = min(decay, 1 - k ** -0.75)``. The first one
    takes the weights, so the average does not depend on initial values, and early ones forget quickly. The rule is that
    of timm's ``ModelEmaV3`` with ``use_warmup`` (K. Crowson); 0.75 is its exponent for runs of fewer than a million
    steps, with which ``d`` reaches 0.999 at update 10,000.

    Args:
        model: the model, without ``DistributedDataParallel``. Its weights are equal in all processes, and so is the
            average.
        decay: 0 (the weights) to less than 1.

    Attributes:
        updates: number of updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self._values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._values |= {name: self._values[name].float() for name in self._parameters}
        self.updates = 0

    def restart(self) -> None:
        """Set the average to the weights."""
        _copy(self._model.state_dict(), self._values)
        self.updates = 0

    def update(self, *_: object) -> None:
        """Update the average after a step of the optimiser, as whose ``step_post_hook`` it can be registered."""
        self.updates += 1
        decay = min(self._decay, 1 - self.updates**-0.75)
        current = self._model.state_dict()
        averages = [self._values[name] for name in self._parameters]
        get_ema_multi_avg_fn(decay)(averages, [current[name].float() for name in self._parameters], self.updates)
        _copy(current, {name: self._values[name] for name in current.keys() - set(self._parameters)})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the model's weights by the average within the block."""
        weights = {name: value.clone() for name, value in self._model.state_dict().items()}
        _copy(self._values, self._model.state_dict())
        try:
            yield
        finally:
            _copy(weights, self._model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the average as ``model``, with the names of the model's state dict, and the number of ``updates``."""
        return {"model": self._values, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of :meth:`state_dict`."""
        _copy(state["model"], self._values)
        self.updates = state["updates"]


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of ``target``."""
    for name, value in target.items():
        value.copy_(source[name])


def build_average(cfg: CfgNode, model: nn.Module) -> WeightAverage | None:
    """Return the average of ``SOLVER.EMA``; None if it is disabled."""
    ema = cfg.SOLVER.EMA
    if not ema.ENABLED:
        return None
    logger.info(f"moving average of the weights with decay {ema.DECAY} (SOLVER.EMA): results and files have {SUFFIX}")
    return WeightAverage(model, ema.DECAY)
