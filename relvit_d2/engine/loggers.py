"""Experiment trackers, Weights & Biases and MLflow, as Detectron2's writers (``LOGGERS``)."""

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from detectron2.utils.events import EventWriter, get_event_storage
from fvcore.common.config import CfgNode

from relvit_d2.config.config_file import flat
from relvit_d2.engine.signals import Interrupted
from relvit_d2.utils.errors import UserError, nearest, one_line

logger = logging.getLogger(__name__)


def check_loggers(names: Sequence[str]) -> None:
    """Raise a :class:`UserError` if a name of ``LOGGERS`` is unknown or its package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"LOGGERS '{name}' is unknown; give {', '.join(TRACKERS)}{nearest(name, list(TRACKERS))}")
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name, as W&B makes, is not the package
            raise UserError(f"LOGGERS {name} needs the package {name}: run pip install 'relvit_d2[loggers]'")


def build_loggers(cfg: CfgNode, run_id: str | None) -> list[EventWriter]:
    """Start the run in each tracker of ``LOGGERS``, or continue it.

    Args:
        cfg: the config.
        run_id: identifies the run; a resumed run has the same.

    Raises:
        UserError: a tracker cannot be reached, or needs a login.
    """
    loggers: list[EventWriter] = []
    for name in cfg.LOGGERS:
        try:
            loggers.append(TRACKERS[name](cfg, run_id))
        except Exception as error:  # the packages have no common base class of their errors
            reason = one_line(error, 200)
            raise UserError(
                f"LOGGERS {name}: the run cannot be started ({reason}): correct the settings of {name}, or remove it "
                "from LOGGERS"
            ) from error
    return loggers


class Tracker(EventWriter):
    """Sends the newest value of each metric, with its iteration.

    A failure is logged and does not end the training; then nothing more is sent, since each try may wait for minutes.

    Attributes:
        name: the key in ``TRACKERS``, also the name of the package.
        sent: last iteration whose metrics the tracker has; those of a resumed run are not sent again.
    """

    name: str
    sent = -1

    def __init__(self) -> None:
        self._has_failed = False

    def write(self) -> None:
        storage = get_event_storage()
        points: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest().items():
            if iteration > self.sent:
                points[iteration][name] = float(value)
        self.sent = max(self.sent, storage.iter)

        def send() -> None:
            for iteration in sorted(points):
                self.send(points[iteration], iteration)

        self._try(send, f"the metrics of iteration {storage.iter} were not sent")

    def close(self) -> None:
        error = sys.exc_info()[1]
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, Interrupted) else "FAILED"
        self._try(partial(self.end, status), "the end of the run was not sent")

    def _try(self, action: Callable[[], None], consequence: str) -> None:
        if self._has_failed:
            return
        try:
            action()
        except Exception as error:
            self._has_failed = True
            reason = one_line(error, 200)
            logger.warning(f"LOGGERS {self.name}: {consequence} ({reason}): no more is sent until the run is resumed")

    def send(self, metrics: Mapping[str, float], iteration: int) -> None:
        """Send the metrics of an iteration."""
        raise NotImplementedError

    def end(self, status: str) -> None:
        """End the run: ``FINISHED``, ``KILLED`` (by a signal, after which it can be continued) or ``FAILED``."""
        raise NotImplementedError


class Wandb(Tracker):
    """Weights & Biases; project, mode and server are those of its environment variables."""

    name = "wandb"

    def __init__(self, cfg: CfgNode, run_id: str | None) -> None:
        import wandb

        super().__init__()
        name = Path(cfg.OUTPUT_DIR).resolve().name
        self._run = wandb.init(id=run_id, resume="allow", name=name, dir=cfg.OUTPUT_DIR, config=flat(cfg))
        self.sent = self._run.starting_step - 1

    def send(self, metrics: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(metrics), step=iteration)

    def end(self, status: str) -> None:
        self._run.finish(exit_code=int(status == "FAILED"))


class Mlflow(Tracker):
    """MLflow; server and experiment are those of its environment variables. The run is found by a tag."""

    name = "mlflow"

    def __init__(self, cfg: CfgNode, run_id: str | None) -> None:
        import mlflow

        super().__init__()
        self._mlflow = mlflow
        tags = {"relvit_d2.run": run_id} if run_id else {}
        condition = f"tags.`relvit_d2.run` = '{run_id}'"
        found = mlflow.search_runs(filter_string=condition, output_format="list", max_results=1) if run_id else []
        if found:
            run = mlflow.start_run(run_id=found[0].info.run_id)
            history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "total_loss")
            self.sent = max((point.step for point in history), default=-1)
        else:
            mlflow.start_run(run_name=Path(cfg.OUTPUT_DIR).resolve().name, tags=tags)
            mlflow.log_text(cfg.dump(), "config.yaml")

    def send(self, metrics: Mapping[str, float], iteration: int) -> None:
        # The characters that MLflow allows.
        allowed = {re.sub(r"[^\w\-. /:]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(allowed, step=iteration)

    def end(self, status: str) -> None:
        self._mlflow.end_run(status)


TRACKERS: dict[str, Callable[[CfgNode, str | None], EventWriter]] = {
    tracker.name: tracker for tracker in (Wandb, Mlflow)
}
