"""Logging of metrics: console, metrics.json, TensorBoard, experiment trackers."""

import datetime
import logging
import math
import sys
from contextvars import ContextVar
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter, get_event_storage
from fvcore.common.config import CfgNode
from tqdm.auto import tqdm as notebook_bar

from relvit_d2.engine.loggers import build_loggers
from relvit_d2.engine.running import RunningTrainer
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing, write_text
from relvit_d2.utils.hardware import peak_memory
from relvit_d2.utils.loader_workers import loader_workers
from relvit_d2.utils.metrics import Metric, from_scalars, parse_row
from relvit_d2.utils.progress import Progress

PERIOD = 20  # iterations between lines on the console and points in TensorBoard and trackers
SLOW_DATA = 0.5  # fraction of the time spent waiting for data from which on a warning is logged

bar_title: ContextVar[str] = ContextVar("bar_title", default="")
"""Text beside a progress bar of the iterations; empty for no bar."""

logger = logging.getLogger(__name__)


class WriterHook(HookBase):
    """Runs Detectron2's writers: ``metrics.json`` every iteration, the others every ``PERIOD``.

    Experiment trackers also get the results of each evaluation at once.

    On resumption, later entries of both files are removed. The row of the checkpoint's iteration keeps values that are
    not computed again.
    """

    trainer: RunningTrainer

    def __init__(self) -> None:
        self._every_step: list[EventWriter] = []
        self._periodic: list[EventWriter] = []
        self._loggers: list[EventWriter] = []
        self._row: dict[str, float] = {}

    def before_train(self) -> None:
        """Open the files."""
        trainer, output = self.trainer, Path(self.trainer.cfg.OUTPUT_DIR)
        if trainer.start_iter:
            self._row = keep_earlier_rows(output / "metrics.json", trainer.first_row)
        else:
            write_text(output / "metrics.json", "")
        self._every_step = [JSONWriter(str(output / "metrics.json"), window_size=1)]
        if title := bar_title.get():
            self._every_step.append(ProgressBar(title, trainer.start_iter, trainer.max_iter))
        self._periodic = [
            ProgressPrinter(trainer.cfg),
            _Board(str(output), window_size=1, purge_step=trainer.first_row),
        ]
        self._loggers = build_loggers(trainer.cfg, trainer.run_id)

    def after_step(self) -> None:
        """Write the metrics of the iteration."""
        storage, done = self.trainer.storage, self.trainer.iter + 1
        new = [name for name, (_, at) in storage.latest().items() if at == self.trainer.iter]
        for name, value in self._row.items():
            if name not in new:
                storage.put_scalar(name, value, smoothing_hint=False)
        self._row = {}
        for writer in self._every_step:
            writer.write()
        periodic = done % PERIOD == 0 or done == self.trainer.max_iter or self.trainer.stopped
        loggers = self._loggers if periodic or self.trainer.evaluates_after(done) else []
        for writer in (*(self._periodic if periodic else []), *loggers):
            writer.write()

    def after_train(self) -> None:
        """Write the metrics of an interrupted iteration and close the files."""
        for writer in self._every_step:
            writer.write()
        for writer in (*self._every_step, *self._periodic, *self._loggers):
            writer.close()


class _Board(TensorboardXWriter):
    """Detectron2's TensorBoard writer, flushed after every write, so that a killed run loses nothing."""

    def write(self) -> None:
        super().write()
        self._writer.flush()


class ProgressBar(EventWriter):
    """A bar of the iterations in a notebook or on stderr; lines where that is not a terminal."""

    def __init__(self, title: str, done: int, total: int) -> None:
        bar = notebook_bar if "ipykernel" in sys.modules else Progress
        self._bar = bar(desc=title, initial=done, total=total, unit="it", mininterval=0.5)

    def write(self) -> None:
        storage = get_event_storage()
        if "total_loss" in storage.histories():
            self._bar.set_postfix_str(f"loss {_median(storage, 'total_loss'):.4g}", refresh=False)
            self._bar.update(storage.iter + 1 - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class ProgressPrinter(EventWriter):
    """Logs a line: progress, remaining time, losses, metrics with chance levels, speed, memory."""

    def __init__(self, cfg: CfgNode) -> None:
        self._max_iter, self._batch, self._device = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DEVICE
        self._workers = loader_workers(cfg)
        self._has_warned = False

    def write(self) -> None:
        """Log the line, and once a warning if data loading takes most of the time."""
        storage = get_event_storage()
        names = storage.histories().keys()
        parts = [f"iter {storage.iter + 1:>{len(str(self._max_iter))}}/{self._max_iter}"]
        waiting, speed = 0.0, []
        if "time" in names:
            left = storage.history("time").median(1000) * (self._max_iter - storage.iter - 1)
            parts.append(f"eta {datetime.timedelta(seconds=int(left))!s:>8}")
            # The median would hide occasional slow batches.
            count = storage.count_samples("time", PERIOD)
            seconds = max(storage.history("time").avg(count), 1e-9)
            waiting = storage.history("data_time").avg(count) / seconds
            speed = [f"{seconds:.3f} s/iter  {self._batch / seconds:5.1f} images/s  data {waiting:4.0%}"]
        losses = [n for n in names if n == "total_loss" or n.startswith("loss_")]
        parts += [f"{n} {_median(storage, n):7.4f}" for n in sorted(losses, key=lambda n: (n != "total_loss", n))]
        for name, metric in from_scalars({name: name for name in names if "/" not in name}).items():
            chance = metric.chance and storage.history(metric.chance).latest()
            parts.append(f"{name} {Metric(_median(storage, metric.value), chance, metric.kind)}")
        if "lr" in names:
            parts.append(f"lr {storage.history('lr').latest():.2e}")
        peak = peak_memory(self._device)
        memory = [] if math.isnan(peak) else [f"memory {peak:.1f} GiB"]
        logger.info("  ".join([*parts, *speed, *memory]))
        if waiting > SLOW_DATA and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"data loading is the bottleneck: {waiting:.0%} of the time is spent waiting for data; raise "
                f"DATALOADER.NUM_WORKERS (now {self._workers}) or store smaller images"
            )


def _median(storage: EventStorage, name: str) -> float:
    return storage.history(name).median(storage.count_samples(name, PERIOD))


def keep_earlier_rows(path: Path, start: int) -> dict[str, float]:
    """Remove the rows of iteration ``start`` and later from ``metrics.json``.

    Lines that are not rows are moved to ``metrics_unreadable.txt`` beside it. They and missing rows are reported.

    Returns:
        The values of iteration ``start``.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): move it away") from error
    kept: list[bytes] = []
    unreadable: list[bytes] = []
    seen: set[int] = set()
    last: dict[str, float] = {}
    for line in filter(bytes.strip, lines):
        row = parse_row(line)
        if row is None:
            unreadable.append(line.rstrip() + b"\n")
        elif row.iteration < start:
            kept.append(line.rstrip() + b"\n")
            seen.add(row.iteration)
        elif row.iteration == start:
            last |= row.scalars
    if unreadable:
        aside = path.with_name("metrics_unreadable.txt")
        with aside.open("ab") as file:
            file.writelines(unreadable)
        logger.warning(f"'{path}' has {len(unreadable)} unreadable line(s): they were moved to '{aside}'")
    if missing := sorted(set(range(start)) - seen):
        logger.warning(
            f"'{path}' lacks {len(missing)} of the {start} rows before the checkpoint, the first of iteration "
            f"{missing[0]}: they cannot be restored"
        )
    with appearing(path) as part:
        part.write_bytes(b"".join(kept))
    return last
