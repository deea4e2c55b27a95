"""The trainer of all tasks."""

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from relvit_d2.engine import signals
from relvit_d2.engine.checkpoint import Checkpointer, check_space
from relvit_d2.engine.config import resolve_epochs
from relvit_d2.engine.distributed import data_parallel
from relvit_d2.engine.gradient_scaling import GRADIENT_NORM, GradientScaler
from relvit_d2.engine.hooks import CheckpointHook, EvaluationHook
from relvit_d2.engine.iteration_values import IterationValues
from relvit_d2.engine.optimizer import build_clipper, build_optimizer
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.provenance import provenance
from relvit_d2.engine.resume import DataList, check_same_run
from relvit_d2.engine.run_setup import log_settings, move_earlier_run
from relvit_d2.engine.schedule import build_schedule
from relvit_d2.engine.signals import Interrupted
from relvit_d2.engine.weight_average import WeightAverage
from relvit_d2.engine.writers import WriterHook
from relvit_d2.utils.batch_source import BatchSource
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json, write_text
from relvit_d2.utils.metrics import Metric, as_scalars
from relvit_d2.utils.processes import first_process_first
from relvit_d2.utils.randomness import seed_everything

logger = logging.getLogger(__name__)


class Trainer(TrainerBase):
    """Trains a model that maps a batch to named losses and metrics.

    Generators are seeded by ``(SEED, iteration, rank)`` in every iteration, and the iteration determines the batch, so
    a resumed run equals an uninterrupted one.

    On a GPU an iteration is launched before the values of the previous one are read, so that the GPU does not wait for
    the host, unless that one is saved or evaluated. This is not done in float16, which reads the gradients before each
    step, nor in detection, where Detectron2's heads read values and log them.

    Custom hooks, such as a ``detectron2.engine.hooks.PeriodicWriter`` with an ``EventWriter``, are registered with
    ``register_hooks`` before :meth:`train` and run after the trainer's. They see the logged values of their iteration,
    but with ``reads_late`` weights that may be one step further.

    Args:
        cfg: the full config; epochs are resolved by :func:`relvit_d2.engine.config.resolve_epochs`.
        model: maps a batch to a dict of scalar losses, whose sum is minimised, and of
            :class:`relvit_d2.utils.metrics.Metric`, which are logged.
        samples: number of training images.
        make_batches: maps the first iteration to the batches from there on.
        evaluate: returns results to log (Detectron2's nested dict); called every ``TEST.EVAL_PERIOD`` iterations and at
            the end. None: no evaluation.
        list_data: returns a line for each training image, as :func:`relvit_d2.data.listing.data_lines`; called in the
            first process, once. None: a resumed run does not detect changed data.
        average: moving average of the model's weights, updated after each step that is not skipped and written to
            ``model_final_ema.pth`` at the end.

    Attributes:
        results: results of the last evaluation.
        interrupt: number of the signal that ends the run, 0 for none; equal in all processes.
        stopped: whether the run stopped early (``TEST.PATIENCE``).
        reads_late: whether an iteration is launched before the values of the previous one are read.
        metadata: JSON values that every checkpoint contains; a resumed run has those of its checkpoint.
        run_id: random identifier of the run, by which checkpoints of an earlier run in ``OUTPUT_DIR`` are recognised;
            None after resuming from a file of an earlier version.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        samples: int,
        make_batches: Callable[[int], BatchSource],
        evaluate: Callable[[], dict[str, Any]] | None = None,
        list_data: Callable[[], list[str]] | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        super().__init__()
        if len(counts := set(comm.all_gather(samples))) > 1:
            raise UserError(
                f"the processes found different numbers of training images ({', '.join(map(str, sorted(counts)))}): "
                "give a folder that all machines read alike"
            )
        self.cfg, self.samples = (cfg := resolve_epochs(cfg, samples)), samples
        self.precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE))
        self._evaluates = evaluate is not None
        self._check_settings()
        log_settings(cfg, samples, self.precision)
        self.optimizer = build_optimizer(cfg, model)
        self.clip = build_clipper(cfg, model)
        self.schedule = build_schedule(cfg)
        self.scaler = GradientScaler(self.precision)
        self.model = data_parallel(model)
        self.make_batches = make_batches
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, optimizer=self.optimizer)
        if self.scaler.is_enabled():
            self.checkpointer.add_checkpointable("scaler", self.scaler)
        self.average = average
        if average:
            self.checkpointer.add_checkpointable("ema", average)
            self.optimizer.register_step_post_hook(average.update)
        self.results: dict[str, Any] = {}
        self.interrupt, self.stopped = 0, False
        in_turn = self.scaler.is_enabled() or cfg.TASK == "detection"
        self.reads_late = torch.device(cfg.MODEL.DEVICE).type == "cuda" and not in_turn
        self._signal = 0  # number of a signal in the values read last; ends the run after the iteration launched last
        self.metadata: dict[str, Any] = {}
        self._data: DataList | None = None
        self._list_data = list_data if comm.is_main_process() else None
        self.run_id: str | None = secrets.token_hex(8)
        self._scalars: dict[str, tuple[float, bool]] = {}
        self._batches: BatchSource
        self._parts: Generator[Any, None, None]
        self.register_hooks([hooks.IterationTimer()])
        self.register_hooks([CheckpointHook(cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP)])
        if evaluate is not None:
            evaluation = EvaluationHook(evaluate, cfg.DATASETS.TEST, cfg.TEST.BEST_METRIC, cfg.TEST.PATIENCE)
            self.checkpointer.add_checkpointable("evaluation", evaluation)
            self.register_hooks([evaluation])
        if comm.is_main_process():
            self.register_hooks([WriterHook()])

    def _check_settings(self) -> None:
        test = self.cfg.TEST
        if (test.BEST_METRIC or test.PATIENCE) and not (self._evaluates and test.EVAL_PERIOD > 0):
            raise UserError(
                "TEST.BEST_METRIC and TEST.PATIENCE need evaluations: set TEST.EVAL_PERIOD and DATASETS.TEST"
            )
        if test.PATIENCE and not test.BEST_METRIC:
            raise UserError(f'TEST.PATIENCE {test.PATIENCE} needs TEST.BEST_METRIC, such as "bbox/AP"')

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation follows after ``done`` iterations."""
        period = self.cfg.TEST.EVAL_PERIOD
        return self._evaluates and (done == self.max_iter or (period > 0 and done % period == 0))

    def saves_after(self, done: int) -> bool:
        """Whether a checkpoint follows after ``done`` iterations."""
        period = self.cfg.SOLVER.CHECKPOINT_PERIOD
        return done == self.max_iter or self.evaluates_after(done) or (period > 0 and done % period == 0)

    @property
    def first_row(self) -> int:
        """First iteration that this run writes to ``metrics.json``: that of the checkpoint, or 0."""
        return max(self.start_iter - 1, 0)

    def save(self, name: str) -> None:
        """Write the checkpoint ``NAME.pth`` for :meth:`resume`."""
        smooth, found = self.storage.smoothing_hints(), self.storage.latest_with_smoothing_hint(1)  # over all parts
        scalars = {key: [float(value), smooth[key]] for key, (value, at) in found.items() if at == self.iter}
        self.checkpointer.save(
            name,
            iteration=self.iter,
            scalars=scalars,
            config=self.cfg.dump(),
            samples=self.samples,
            processes=comm.get_world_size(),
            metadata=self.metadata,
            run=self.run_id,
            data=self._data and self._data.digest,
        )

    def resume(self, allow_changes: bool = False) -> bool:
        """Load the last checkpoint in ``OUTPUT_DIR``; return whether there was one.

        Raises:
            UserError: the checkpoint is of another config or program or does not fit, or only some processes find it.
        """
        newest = comm.all_gather(self._newest_checkpoint() if comm.is_main_process() else "")[0]
        if not all(comm.all_gather(Path(newest).is_file() if newest else not self.checkpointer.has_checkpoint())):
            raise UserError(
                f"OUTPUT_DIR '{self.cfg.OUTPUT_DIR}' holds a checkpoint for some processes only: give a folder that "
                "all machines share"
            )
        if not newest:
            logger.info(f"no checkpoint in '{self.cfg.OUTPUT_DIR}': starting at iteration 0")
            return False
        with first_process_first():
            if self._list_data:
                self._data = DataList(self._list_data())
        self.checkpointer.validate = partial(check_same_run, self.cfg, self.samples, self._data, allow_changes)
        extra = self.checkpointer.load(newest)
        self.start_iter, self._scalars, self.run_id = extra["iteration"] + 1, extra["scalars"], extra.get("run")
        self.metadata = extra.get("metadata", {})
        logger.info(f"resumed at iteration {self.start_iter}")
        if extra["processes"] != comm.get_world_size():
            logger.warning(
                f"the run continues with {comm.get_world_size()} processes instead of {extra['processes']}: its random "
                "numbers, and so its results, differ from here on"
            )
        return True

    def _newest_checkpoint(self) -> str:
        """Return the path of the newest intact checkpoint of the last run in ``OUTPUT_DIR``; "" if there is none."""
        try:
            run = json.loads((Path(self.cfg.OUTPUT_DIR) / "run.json").read_text(encoding="utf-8")).get("run")
        except (OSError, ValueError, AttributeError):  # missing or damaged
            run = None
        return self.checkpointer.newest_intact(run)

    def train(self) -> None:  # type: ignore[override]
        """Run the remaining iterations.

        Raises:
            Interrupted: after SIGINT or SIGTERM, once the current iteration is saved.
        """
        with first_process_first() as is_first:
            if is_first:
                self._prepare_output()
        self.iter = self.start_iter
        self.model.train()
        if self.average and not self.average.updates:  # weights may have been loaded after it was built
            self.average.restart()
        with EventStorage(self.start_iter) as self.storage, signals.deferred():
            try:
                self.before_train()
                if self.start_iter:
                    self._finish_iteration()
                if self.start_iter < self.max_iter and not self.stopped:
                    self._batches = self.make_batches(self.start_iter)
                    with closing(iter(self._batches)) as self._parts:  # ends the worker processes
                        self._iterate()
                    self._report_replaced()
                if self.scaler.skipped:
                    logger.info(f"{self.scaler.skipped} of {self.iter + 1} steps were skipped (gradient overflow)")
                if self.stopped:
                    self.save("model_final")
                self._save_average()
            except BaseException:
                for hook in self._hooks:
                    if isinstance(hook, WriterHook | hooks.PeriodicWriter):
                        hook.after_train()
                raise
            self.after_train()

    def _save_average(self) -> None:
        if self.average and comm.is_main_process():
            state = {"ema": self.average.state_dict()}
            info = {"iteration": self.iter, "config": self.cfg.dump(), "metadata": self.metadata, "run": self.run_id}
            self.checkpointer.save_average("model_final", state, **info)
        comm.synchronize()  # no process may read the file, or exit, while the first one writes

    def _prepare_output(self) -> None:
        """Write config and provenance, remove ``not_finite_*.json``; unless resumed, move an earlier run's files."""
        output = Path(self.cfg.OUTPUT_DIR)
        output.mkdir(parents=True, exist_ok=True)
        check_space(output, self._checkpoint_bytes(), self._checkpoint_bytes(2))
        if self.start_iter == 0:
            move_earlier_run(output)
        write_text(output / "config.yaml", self.cfg.dump())
        if self._list_data:
            self._data = self._data or DataList(self._list_data())
            self._data.write(output)
        write_json(output / "run.json", provenance(self.cfg) | {"run": self.run_id})
        for file in output.glob("not_finite_*.json"):
            file.unlink()

    def _checkpoint_bytes(self, most: float = math.inf) -> float:
        """Return the size of the checkpoints that the run is going to keep, at most ``most`` besides the last one."""
        solver, test = self.cfg.SOLVER, self.cfg.TEST
        values = sum(value.numel() * value.element_size() for value in self.model.state_dict().values())
        trained = sum(p.numel() * p.element_size() for group in self.optimizer.param_groups for p in group["params"])
        rest = self.max_iter - self.start_iter
        periods = [period for period in (solver.CHECKPOINT_PERIOD, test.EVAL_PERIOD) if period > 0]
        numbered = sum(rest // period for period in periods) - (rest // math.lcm(*periods) if len(periods) > 1 else 0)
        if solver.CHECKPOINT_MAX_TO_KEEP:
            numbered = min(numbered, solver.CHECKPOINT_MAX_TO_KEEP + 1)  # a new one is written before an old one goes
        models = 2 if self.average else 1
        checkpoint = models * values + 2 * trained  # AdamW has two moments
        exported = models * bool(test.BEST_METRIC) + models - 1
        return (min(numbered, most) + 1) * checkpoint + exported * values

    def _finish_iteration(self) -> None:
        """Repeat the hooks of the checkpoint's iteration, which a kill may have interrupted."""
        self.iter = self.start_iter - 1
        self.before_step()
        for name, (value, smooth) in self._scalars.items():
            self.storage.put_scalar(name, value, smoothing_hint=smooth)
        self.after_step()

    def _iterate(self) -> None:
        following: IterationValues | None = None
        for step in range(self.start_iter, self.max_iter):
            self.iter = step
            self.before_step()
            values, following = following or self.run_step(), None
            if self.reads_late:
                if not (self._signal or self.saves_after(step + 1)):
                    self.iter = step + 1
                    following = self.run_step()
                    self.iter = step
                self._record(values)
            self.interrupt = 0 if following else self._signal
            self.after_step()
            if self.interrupt:
                logger.info(f"stopping after iteration {self.iter}, which is saved; continue with --resume")
                raise Interrupted(self.interrupt)
            if self.stopped:
                break

    def _report_replaced(self) -> None:
        files = sorted({file for files in comm.gather(self._batches.replaced) for file in files})
        if files:
            logger.warning(
                f"{len(files)} training images could not be read and were replaced by the next ones: "
                f"{', '.join(files[:5])}{', ...' if len(files) > 5 else ''}"
            )

    def run_step(self) -> IterationValues:  # type: ignore[override]
        """Read a batch, in parts, and take an optimisation step, after reading its values unless ``reads_late``."""
        seed_everything(self.cfg.SEED, "iteration", self.iter, comm.get_rank())
        rate = self.schedule(self.iter)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad()
        parts = self.cfg.SOLVER.GRAD_ACCUM_STEPS
        parallel = self.model if isinstance(self.model, DistributedDataParallel) else None
        data_time = 0.0
        means: dict[str, Tensor] = {}
        for part in range(parts):
            start = time.perf_counter()
            batch = next(self._parts)
            data_time += time.perf_counter() - start
            with parallel.no_sync() if parallel and part < parts - 1 else nullcontext():  # one all-reduce per step
                outputs = self._forward(batch)
                losses = [value for value in outputs.values() if not isinstance(value, Metric)]
                total = torch.stack([loss.float() for loss in losses]).sum() / parts
                self.scaler.scale(total).backward()
            for name, value in as_scalars({**outputs, "total_loss": total * parts}).items():
                value = torch.as_tensor(value, dtype=torch.float32).detach() / parts
                means[name] = means[name] + value if name in means else value
        self.scaler.unscale_(self.optimizer)
        means[GRADIENT_NORM] = self.clip()
        values = IterationValues(self.iter, means, rate, data_time, signals.received())
        if not self.reads_late:
            self._record(values)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    def _forward(self, batch: Any) -> dict[str, Tensor | Metric[Any]]:
        try:
            with self.precision.autocast():
                return self.model(batch)
        except FloatingPointError as error:  # raised by Detectron2 for proposals
            raise self._not_finite("proposals", float("nan"), True) from error

    def _record(self, values: IterationValues) -> None:
        """Store the values of the current iteration, if they are finite; raise if training cannot go on."""
        mean, signal = values.read()
        not_finite = {name: mean.pop(name) for name, number in list(mean.items()) if not math.isfinite(number)}
        if not self.scaler.tolerates(not_finite):
            # The gradient norm is common to all processes, so the images are found by the loss of each process, unless
            # the losses of all are finite.
            is_cause = not values.is_loss_finite() or "total_loss" in mean
            raise self._not_finite(*next(iter(not_finite.items())), is_cause)
        if signal:
            self._signal = max(comm.all_gather(signals.received()))
        scaling = self.scaler.metrics()
        if not_finite:
            skipped = f": the step is skipped and the gradient scale {scaling['grad_scale']:g} halved"
            logger.info(
                f"{', '.join(not_finite)} not finite in float16 at iteration {self.iter}"
                f"{skipped if GRADIENT_NORM in not_finite else ''}"
            )
        times = {"lr": values.rate, "data_time": values.data_time}
        self.storage.put_scalars(**mean, **scaling, **times, smoothing_hint=False)

    def _not_finite(self, name: str, number: float, is_cause: bool) -> UserError:
        """Write the images of this process to a file if they are the cause; return the error."""
        output = Path(self.cfg.OUTPUT_DIR)
        if is_cause:
            images = {"iteration": self.iter, "term": name, "images": self._batches.names(self.iter)}
            write_json(output / f"not_finite_{comm.get_rank()}.json", images)
        resumable = self.checkpointer.has_checkpoint()
        return UserError(
            f"'{name}' became {number} at iteration {self.iter}{self.scaler.describe()}, "
            f"{output}/not_finite_*.json lists the images"
            f"{' and the last checkpoint is intact' if resumable else ''}: check them, lower SOLVER.BASE_LR, raise "
            "SOLVER.WARMUP_ITERS or set SOLVER.PRECISION float32, then "
            f"{'continue with --resume --allow-changes' if resumable else 'restart'}"
        )
