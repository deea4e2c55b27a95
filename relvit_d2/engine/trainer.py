"""The one trainer under all scripts."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from relvit_d2.engine.checkpoint import Checkpointer
from relvit_d2.engine.optimizer import build_clipper, build_optimizer
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.randomness import seed_everything
from relvit_d2.engine.schedule import build_schedule
from relvit_d2.engine.writers import ProgressPrinter, drop_later_metrics
from relvit_d2.errors import UserError

PRINT_PERIOD = 20

logger = logging.getLogger(__name__)


class Trainer(TrainerBase):
    """Trains a model that turns a batch into named losses and metrics.

    Every iteration starts from generators seeded by ``(SEED, iteration, rank)`` and reads the batch that
    belongs to it, so a resumed run does what the straight run would have done.

    Args:
        cfg: the full config.
        model: batch -> dict; entries whose name starts with ``loss`` are summed and minimised, the others are
            metrics to log.
        samples: number of training images, for the log.
        make_loader: first iteration -> endless iterable of batches.
        evaluate: returns results to log (Detectron2's nested dict); run every ``TEST.EVAL_PERIOD``
            iterations and at the end. None: no evaluation.

    Attributes:
        results: what the last evaluation returned.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        samples: int,
        make_loader: Callable[[int], Iterable[Any]],
        evaluate: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE))
        logger.info(f"precision: {str(self.precision.dtype).removeprefix('torch.')} ({self.precision.reason})")
        seen = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
        logger.info(
            f"{samples} training images; {cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} "
            f"are {seen / samples:.1f} epochs"
        )
        self.optimizer = build_optimizer(cfg, model)
        self.clip = build_clipper(cfg, model)
        self.schedule = build_schedule(cfg)
        self.model = _distributed(model)
        self.make_loader = make_loader
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, optimizer=self.optimizer)
        self.results: dict[str, Any] = {}
        self._batches: Iterator[Any]
        self._writers: list[HookBase] = []
        self._evaluate = evaluate

    def resume(self) -> bool:
        """Go on from the last checkpoint in ``OUTPUT_DIR``; return whether there was one."""
        if not self.checkpointer.has_checkpoint():
            logger.info(f"no checkpoint in '{self.cfg.OUTPUT_DIR}': starting at iteration 0")
            return False
        extra = self.checkpointer.load(self.checkpointer.get_checkpoint_file())
        self.start_iter = extra["iteration"] + 1
        logger.info(f"resumed at iteration {self.start_iter}")
        return True

    def train(self) -> None:  # type: ignore[override]
        """Run from the first iteration that is left to the last."""
        self._register_hooks()
        self.iter = self.start_iter
        self.model.train()
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                if self.start_iter < self.max_iter:
                    self._batches = iter(self.make_loader(self.start_iter))
                for self.iter in range(self.start_iter, self.max_iter):  # noqa: B020  (Detectron2's hooks read it)
                    self.before_step()
                    self.run_step()
                    self.after_step()
            except BaseException:
                for writer in self._writers:
                    writer.after_train()
                raise
            self.iter = self.max_iter
            self.after_train()

    def run_step(self) -> None:
        """Read one batch and take one optimisation step."""
        seed_everything(self.cfg.SEED, "iteration", self.iter, comm.get_rank())
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start
        rate = self.schedule(self.iter)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.precision.autocast():
            outputs: dict[str, Tensor] = self.model(batch)
        losses = [value for name, value in outputs.items() if name.startswith("loss")]
        total = torch.stack([loss.float() for loss in losses]).sum()
        self.optimizer.zero_grad()
        total.backward()
        norm = self.clip()
        self._log(outputs, total, norm, rate, data_time)
        self.optimizer.step()

    def _log(self, outputs: dict[str, Tensor], total: Tensor, norm: Tensor, rate: float, data_time: float) -> None:
        """Put the step's numbers into the storage, the mean over processes; stop before a step that is not finite."""
        names = [*outputs, "total_loss", "grad_norm"]
        values = torch.stack([v.detach().float().to(total.device) for v in (*outputs.values(), total, norm)])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= comm.get_world_size()
        numbers = dict(zip(names, values.tolist(), strict=True))
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise UserError(
                    f"'{name}' became {number} at iteration {self.iter}; lower SOLVER.BASE_LR, lengthen "
                    "SOLVER.WARMUP_ITERS or set SOLVER.PRECISION float32, then go on with --resume"
                )
        self.storage.put_scalars(**numbers, lr=rate, data_time=data_time, smoothing_hint=False)

    def _run_evaluation(self) -> dict[str, Any]:
        assert self._evaluate is not None
        self.results = self._evaluate()
        return self.results

    def _register_hooks(self) -> None:
        output = Path(self.cfg.OUTPUT_DIR)
        output.mkdir(parents=True, exist_ok=True)
        self.register_hooks([hooks.IterationTimer()])
        if comm.is_main_process():
            period = self.cfg.SOLVER.CHECKPOINT_PERIOD
            self.register_hooks([hooks.PeriodicCheckpointer(self.checkpointer, period, self.max_iter)])
        if self._evaluate is not None:
            self.register_hooks([hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._run_evaluation)])
        if comm.is_main_process():
            drop_later_metrics(output / "metrics.json", self.start_iter)
            printer = ProgressPrinter(self.max_iter, self.cfg.SOLVER.IMS_PER_BATCH)
            board = TensorboardXWriter(str(output), window_size=1, purge_step=self.start_iter)
            self._writers = [
                hooks.PeriodicWriter([JSONWriter(str(output / "metrics.json"), window_size=1)], period=1),
                hooks.PeriodicWriter([printer, board], period=PRINT_PERIOD),
            ]
            self.register_hooks(self._writers)


def _distributed(model: nn.Module) -> nn.Module:
    """Wrap the model where there is more than one process."""
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(
        model, device_ids=[comm.get_local_rank()] if on_gpu else None, broadcast_buffers=False
    )
