"""The trainer as its hooks see it, below both."""

from typing import Any, Protocol

from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode

from relvit_d2.engine.checkpoint import Checkpointer
from relvit_d2.engine.weight_average import WeightAverage


class RunningTrainer(Protocol):
    """Attributes of :class:`relvit_d2.engine.trainer.Trainer`, which documents them."""

    cfg: CfgNode
    checkpointer: Checkpointer
    average: WeightAverage | None
    iter: int
    start_iter: int
    max_iter: int
    storage: EventStorage
    results: dict[str, Any]
    metadata: dict[str, Any]
    run_id: str | None
    interrupt: int
    stopped: bool

    @property
    def first_row(self) -> int:
        """Iteration of the first row of ``metrics.json`` that this run writes."""
        ...

    def evaluates_after(self, done: int) -> bool:
        """Whether there is an evaluation after ``done`` iterations."""
        ...

    def saves_after(self, done: int) -> bool:
        """Whether there is a checkpoint after ``done`` iterations."""
        ...

    def save(self, name: str) -> None:
        """Write a checkpoint."""
        ...
