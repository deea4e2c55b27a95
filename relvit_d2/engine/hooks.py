"""Hooks of the trainer: checkpoints, evaluation, selection of the best model, early stopping."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from relvit_d2.engine import signals
from relvit_d2.engine.running import RunningTrainer
from relvit_d2.engine.weight_average import SUFFIX
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.metrics import less_is_better

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Writes a checkpoint when :meth:`Trainer.saves_after` is true and on a signal.

    Args:
        keep: number of the newest numbered checkpoints to keep; 0: all.
    """

    trainer: RunningTrainer

    def __init__(self, keep: int) -> None:
        self._keep = keep

    def after_step(self) -> None:
        trainer, done = self.trainer, self.trainer.iter + 1
        if trainer.iter < trainer.start_iter:  # the run resumed from this checkpoint
            return
        if done == trainer.max_iter:
            trainer.save("model_final")
        elif trainer.interrupt or trainer.saves_after(done):
            trainer.save(f"model_{trainer.iter:07d}")
            if self._keep and comm.is_main_process():
                files = sorted(Path(trainer.cfg.OUTPUT_DIR).glob("model_" + "[0-9]" * 7 + ".pth"))
                older = [file for file in files if int(file.stem[6:]) <= trainer.iter]
                for file in older[: -self._keep]:
                    file.unlink()
        else:
            return
        comm.synchronize()  # no process may exit while the first one writes


class EvaluationHook(HookBase):
    """Evaluates when :meth:`Trainer.evaluates_after` is true, keeps the best model and stops early.

    Args:
        evaluate: returns Detectron2's nested dict of results; empty in all processes but the first.
        tests: names of the test sets; a best value of other test sets is discarded on resumption.
        metric: flattened name, such as ``bbox/AP``, of the metric that selects ``model_best.pth``; losses and errors
            are minimised (:func:`relvit_d2.utils.metrics.less_is_better`). Empty: none.
        patience: number of evaluations without improvement after which the run ends; 0: no early stopping.

    Attributes:
        best: best value so far; None before the first.
        best_iteration: iteration of the best value.
        stale: evaluations since the best value.
        counted: iteration of the last evaluation in ``stale``, which is not counted again if it is repeated on
            resumption.
    """

    trainer: RunningTrainer

    def __init__(
        self, evaluate: Callable[[], dict[str, Any]], tests: Sequence[str], metric: str, patience: int
    ) -> None:
        self._evaluate, self._tests, self._metric, self._patience = evaluate, list(tests), metric, patience
        self.best: float | None = None
        self.best_iteration, self.stale, self.counted = 0, 0, -1

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resumption, plain values."""
        counts = {"best_iteration": self.best_iteration, "stale": self.stale, "counted": self.counted}
        return {"tests": self._tests, "metric": self._metric, "best": self.best} | counts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, unless the metric or the test sets have changed."""
        if (state["metric"], state["tests"]) == (self._metric, self._tests):
            self.best, self.best_iteration = state["best"], state["best_iteration"]
            self.stale, self.counted = state["stale"], state["counted"]
        elif self._metric and state["metric"]:
            logger.info(
                f"the best value so far is discarded: TEST.BEST_METRIC was {state['metric']} on "
                f"{', '.join(state['tests'])}, now it is {self._metric} on {', '.join(self._tests)}"
            )

    def before_train(self) -> None:
        """Check that ``model_best.pth`` is the best model so far."""
        if self.best is not None and comm.is_main_process():
            self._restore_best()

    def _restore_best(self) -> None:
        """Write ``model_best.pth`` again from a checkpoint if it is damaged, missing or older than the best value.

        The same holds for the file of the moving average.
        """
        trainer, checkpointer, problems = self.trainer, self.trainer.checkpointer, list[str]()
        folder = Path(trainer.cfg.OUTPUT_DIR)
        for suffix in ("", SUFFIX) if trainer.average else ("",):
            path = folder / f"model_best{suffix}.pth"
            content = checkpointer.read_intact(str(path), problems)
            # A later one is of an evaluation after this checkpoint, which is repeated.
            if not (
                content and content.get("run") == trainer.run_id and content.get("iteration", -1) >= self.best_iteration
            ):
                break
        else:
            return
        problem = problems[0] if content is None else f"'{path}' is not of this run's best value"
        for name in (f"model_{self.best_iteration:07d}.pth", "model_final.pth"):
            content = checkpointer.read_intact(str(folder / name), problems)
            if content and (content.get("iteration"), content.get("run")) == (self.best_iteration, trainer.run_id):
                checkpointer.save_best(
                    content,
                    iteration=self.best_iteration,
                    metric=self._metric,
                    value=self.best,
                    metadata=content.get("metadata", {}),
                    run=trainer.run_id,
                )
                logger.warning(f"{problem}: it was written again from '{folder / name}'")
                return
        logger.warning(
            f"{problem}, and the checkpoint of iteration {self.best_iteration} is not there either: the best value "
            f"{self.best:.4g} is discarded and the next evaluation is the best"
        )
        self.best, self.stale, self.counted = None, 0, -1

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.interrupt or not trainer.evaluates_after(trainer.iter + 1):
            return
        with signals.immediate():
            trainer.results = self._evaluate()
        scalars = {name: float(value) for name, value in flatten_results_dict(trainer.results).items()}
        trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        if self._metric:
            # Only the first process has the results.
            trainer.stopped = comm.all_gather(comm.is_main_process() and self._update_best(scalars))[0]
        comm.synchronize()

    def _update_best(self, scalars: dict[str, float]) -> bool:
        """Update the best value and save the model; return whether the run ends."""
        if self._metric not in scalars:
            known = sorted(scalars)
            raise UserError(
                f"TEST.BEST_METRIC '{self._metric}' is not one of {', '.join(known)}{nearest(self._metric, known)}"
            )
        value, trainer = scalars[self._metric], self.trainer
        sign = -1 if less_is_better(self._metric) else 1
        if trainer.iter > self.counted:
            self.counted = trainer.iter
            self.stale += 1
            if not math.isnan(value) and (self.best is None or sign * value > sign * self.best):
                self.best, self.best_iteration, self.stale = value, trainer.iter, 0
                selected = {"iteration": trainer.iter, "metric": self._metric, "value": value}
                state = trainer.checkpointer.state()
                trainer.checkpointer.save_best(state, **selected, metadata=trainer.metadata, run=trainer.run_id)
        if not self._patience or self.stale < self._patience:
            return False
        best = "none" if self.best is None else f"{self.best:.4g} after iteration {self.best_iteration}"
        logger.info(
            f"{self._metric} did not improve in {self.stale} evaluations (TEST.PATIENCE): the run ends after iteration "
            f"{trainer.iter}; best value: {best}"
        )
        return True
