"""What a run tells about itself: the console line and metrics.json."""

import datetime
import json
import logging
from pathlib import Path

import torch
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from relvit_d2.files import write_text

_WINDOW = 20


class ProgressPrinter(EventWriter):
    """One line a period: progress, time left, losses, accuracies beside their chance levels, speed, memory.

    Args:
        max_iter: iterations of the whole run.
        batch: images an iteration, all processes together.
    """

    def __init__(self, max_iter: int, batch: int) -> None:
        self._max_iter, self._batch = max_iter, batch
        self._logger = logging.getLogger("relvit_d2.progress")

    def write(self) -> None:
        """Log the line; silent after the last iteration, when there is no progress left to tell."""
        storage = get_event_storage()
        if storage.iter >= self._max_iter:
            return
        names = storage.histories().keys()
        parts = [f"iter {storage.iter + 1}/{self._max_iter}"]
        if "time" in names:
            seconds = _median(storage, "time")
            left = storage.history("time").median(1000) * (self._max_iter - storage.iter - 1)
            parts.append(f"eta {datetime.timedelta(seconds=int(left))}")
        losses = [n for n in names if n == "total_loss" or n.startswith("loss_")]
        parts += [f"{n} {_median(storage, n):.4g}" for n in sorted(losses, key=lambda n: (n != "total_loss", n))]
        for name in (n for n in names if n.startswith("accuracy_")):
            task = name.removeprefix("accuracy_")
            parts.append(
                f"{task} {_median(storage, name):.1%} (chance {storage.history('chance_' + task).latest():.1%})"
            )
        if "lr" in names:
            parts.append(f"lr {storage.history('lr').latest():.3g}")
        if "time" in names:
            waiting = _median(storage, "data_time") / max(seconds, 1e-9)
            parts.append(f"{seconds:.3f} s/iter  {self._batch / max(seconds, 1e-9):.1f} images/s  data {waiting:.0%}")
        if torch.cuda.is_available():
            parts.append(f"memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        self._logger.info("  ".join(parts))


def _median(storage: EventStorage, name: str) -> float:
    return storage.history(name).median(storage.count_samples(name, _WINDOW))


def drop_later_metrics(path: Path, start: int) -> None:
    """Remove what a killed run wrote to ``metrics.json`` beyond the checkpoint it resumes from.

    Lines of iteration ``start`` and later go, as does a last line that was cut short.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["iteration"] < start:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(kept))
