"""What happens after an iteration: checkpoints, evaluation, the choice of the best model."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from relvit_d2.engine import signals
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.metrics import less_is_better

if TYPE_CHECKING:
    from relvit_d2.engine.trainer import Trainer

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Writes a checkpoint every ``period`` iterations, before every evaluation, on a signal and at the end.

    Args:
        period: iterations; 0 for none in between.
        keep: how many numbered checkpoints stay, the newest; 0 for all.
    """

    trainer: "Trainer"

    def __init__(self, period: int, keep: int) -> None:
        self._period, self._keep = period, keep

    def after_step(self) -> None:
        """See the class."""
        trainer, done = self.trainer, self.trainer.iter + 1
        if trainer.iter < trainer.start_iter:  # this very checkpoint was read
            return
        if done == trainer.max_iter:
            trainer.save("model_final")
        elif trainer.interrupt or trainer.evaluates_after(done) or (self._period > 0 and done % self._period == 0):
            trainer.save(f"model_{trainer.iter:07d}")
            if self._keep and comm.is_main_process():
                files = sorted(Path(trainer.cfg.OUTPUT_DIR).glob("model_" + "[0-9]" * 7 + ".pth"))
                older = [file for file in files if int(file.stem[6:]) <= trainer.iter]
                for file in older[: -self._keep]:
                    file.unlink()
        else:
            return
        comm.synchronize()  # a process that does not write must not end the run of the one that does


class EvaluationHook(HookBase):
    """Evaluates when :meth:`Trainer.evaluates_after` says so, keeps the best model, and may end the run.

    Args:
        evaluate: returns Detectron2's nested dict of results; empty in all processes but the first.
        tests: the names of what it evaluates on; a best value on others does not count.
        metric: the flattened name, such as ``bbox/AP``, whose best value decides ``model_best.pth``: the least of a
            loss or an error, else the greatest (:func:`relvit_d2.utils.metrics.less_is_better`). Empty for none.
        patience: evaluations in a row without a better value that end the run; 0 for no end.

    Attributes:
        best: the best value so far, None before the first.
        best_iteration: the iteration that it came after.
        stale: evaluations since.
        counted: the iteration of the last evaluation in them; done once more on resumption, it does not count again.
    """

    trainer: "Trainer"

    def __init__(
        self, evaluate: Callable[[], dict[str, Any]], tests: Sequence[str], metric: str, patience: int
    ) -> None:
        self._evaluate, self._tests, self._metric, self._patience = evaluate, list(tests), metric, patience
        self.best: float | None = None
        self.best_iteration, self.stale, self.counted = 0, 0, -1

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know, plain values."""
        counts = {"best_iteration": self.best_iteration, "stale": self.stale, "counted": self.counted}
        return {"tests": self._tests, "metric": self._metric, "best": self.best} | counts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, unless it was another metric or other test sets."""
        if (state["metric"], state["tests"]) == (self._metric, self._tests):
            self.best, self.best_iteration = state["best"], state["best_iteration"]
            self.stale, self.counted = state["stale"], state["counted"]
        elif self._metric and state["metric"]:
            logger.info(
                f"the best value so far is forgotten: it was {state['metric']} on {', '.join(state['tests'])}, now it "
                f"is {self._metric} on {', '.join(self._tests)}"
            )

    def after_step(self) -> None:
        """See the class."""
        trainer = self.trainer
        if trainer.interrupt or not trainer.evaluates_after(trainer.iter + 1):
            return
        with signals.immediate():
            trainer.results = self._evaluate()
        scalars = {name: float(value) for name, value in flatten_results_dict(trainer.results).items()}
        trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        if self._metric:
            # Only the first process has results, and all of them stop or none.
            trainer.stopped = comm.all_gather(comm.is_main_process() and self._is_enough(scalars))[0]
        comm.synchronize()

    def _is_enough(self, scalars: dict[str, float]) -> bool:
        """Compare with the best value so far; return whether patience is at its end."""
        if self._metric not in scalars:
            known = sorted(scalars)
            raise UserError(
                f"TEST.BEST_METRIC '{self._metric}' is none of {', '.join(known)}{nearest(self._metric, known)}"
            )
        value, trainer = scalars[self._metric], self.trainer
        sign = -1 if less_is_better(self._metric) else 1
        if trainer.iter > self.counted:
            self.counted = trainer.iter
            self.stale += 1
            if not math.isnan(value) and (self.best is None or sign * value > sign * self.best):
                self.best, self.best_iteration, self.stale = value, trainer.iter, 0
                chosen = {"iteration": trainer.iter, "metric": self._metric, "value": value}
                trainer.checkpointer.save_best(**chosen, kept=trainer.kept)
        if not self._patience or self.stale < self._patience:
            return False
        best = "no value yet" if self.best is None else f"{self.best:.4g} after iteration {self.best_iteration}"
        logger.info(
            f"{self._metric} was not better for {self.stale} evaluations (TEST.PATIENCE): the run ends after iteration "
            f"{trainer.iter}; best was {best}"
        )
        return True
