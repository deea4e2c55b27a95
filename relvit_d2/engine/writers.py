"""What a run tells about itself: the console line, metrics.json, TensorBoard."""

import datetime
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter, get_event_storage
from fvcore.common.config import CfgNode

from relvit_d2.utils.files import write_text
from relvit_d2.utils.hardware import peak_memory
from relvit_d2.utils.metrics import Metric, from_scalars

if TYPE_CHECKING:
    from relvit_d2.engine.trainer import Trainer

PERIOD = 20  # iterations between lines on the console and points in TensorBoard
SLOW_DATA = 0.5  # share of the time spent waiting for data that is worth a word

logger = logging.getLogger(__name__)


class WriterHook(HookBase):
    """Runs Detectron2's writers: ``metrics.json`` every iteration, console and TensorBoard every ``PERIOD``.

    What a killed run wrote beyond the first iteration of this one is taken out of both files. The row of the iteration
    that a resumed run finishes once more keeps what is not measured anew.
    """

    trainer: "Trainer"

    def __init__(self) -> None:
        self._often: list[EventWriter] = []
        self._seldom: list[EventWriter] = []
        self._row: dict[str, float] = {}

    def before_train(self) -> None:
        """Open the files."""
        trainer, output = self.trainer, Path(self.trainer.cfg.OUTPUT_DIR)
        row = drop_later_metrics(output / "metrics.json", trainer.first_row)
        self._row = row if trainer.start_iter else {}
        self._often = [JSONWriter(str(output / "metrics.json"), window_size=1)]
        self._seldom = [
            ProgressPrinter(trainer.cfg),
            _Board(str(output), window_size=1, purge_step=trainer.first_row),
        ]

    def after_step(self) -> None:
        """Write what the iteration left in the storage."""
        storage, done = self.trainer.storage, self.trainer.iter + 1
        new = [name for name, (_, at) in storage.latest().items() if at == self.trainer.iter]
        storage.put_scalars(**{k: v for k, v in self._row.items() if k not in new}, smoothing_hint=False)
        self._row = {}
        for writer in self._often:
            writer.write()
        if done % PERIOD == 0 or done == self.trainer.max_iter or self.trainer.stopped:
            for writer in self._seldom:
                writer.write()

    def after_train(self) -> None:
        """Close the files, after a last row of what an iteration that was cut short had measured."""
        for writer in self._often:
            writer.write()
        for writer in (*self._often, *self._seldom):
            writer.close()


class _Board(TensorboardXWriter):
    """Detectron2's writer, whose points reach the file when they are written: a killed run loses none."""

    def write(self) -> None:
        super().write()
        self._writer.flush()


class ProgressPrinter(EventWriter):
    """One line a period: progress, time left, losses, accuracies beside their chance levels, speed, memory."""

    def __init__(self, cfg: CfgNode) -> None:
        self._max_iter, self._batch, self._device = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DEVICE
        self._workers = cfg.DATALOADER.NUM_WORKERS
        self._said_slow = False

    def write(self) -> None:
        """Log the line; once, that reading the data takes most of the time."""
        storage = get_event_storage()
        names = storage.histories().keys()
        parts = [f"iter {storage.iter + 1:>{len(str(self._max_iter))}}/{self._max_iter}"]
        waiting, speed = 0.0, []
        if "time" in names:
            left = storage.history("time").median(1000) * (self._max_iter - storage.iter - 1)
            parts.append(f"eta {datetime.timedelta(seconds=int(left))!s:>8}")
            # A median would not see that one batch in a few is late.
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
        logger.info("  ".join([*parts, *speed, f"memory {peak_memory(self._device):.1f} GiB"]))
        if waiting > SLOW_DATA and not self._said_slow:
            self._said_slow = True
            logger.warning(
                f"reading the data is the bottleneck: {waiting:.0%} of the time is spent waiting for it; raise "
                f"DATALOADER.NUM_WORKERS (now {self._workers}) or store smaller images"
            )


def _median(storage: EventStorage, name: str) -> float:
    return storage.history(name).median(storage.count_samples(name, PERIOD))


def drop_later_metrics(path: Path, start: int) -> dict[str, float]:
    """Remove what a killed run wrote to ``metrics.json`` beyond the checkpoint it resumes from.

    Lines of iteration ``start`` and later go, as does a last line that was cut short.

    Returns:
        What the line of iteration ``start`` held.
    """
    if not path.exists():
        return {}
    kept: list[str] = []
    held: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            at = row.pop("iteration")
        except (ValueError, KeyError):
            continue
        if at < start:
            kept.append(line + "\n")
        elif at == start:
            held |= row
    write_text(path, "".join(kept))
    return held
