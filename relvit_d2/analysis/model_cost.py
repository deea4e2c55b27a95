"""Cost of a model by stage: parameters, FLOPs, activation memory and speed; and the batch size that fits."""

import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from tabulate import tabulate  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from relvit_d2.engine.precision import choose_precision
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.hardware import device_name, free_memory

ADAMW = 16  # bytes per trained parameter: value, gradient and AdamW's two moments, float32
USABLE = 0.8  # fraction of the free memory for activations; the rest is for temporary buffers of the backward pass
LARGEST = 16  # images per measured step if none are given
REPEATS = 3
REST = "rest"  # the parts of the model outside of the stages
ALL = "all"

Stages = dict[str, tuple[Any, ...]]


class Subject(NamedTuple):
    """A model to measure.

    Attributes:
        model: maps a batch to a dict that includes the losses.
        stages: see :class:`Meter`.
        batches: maps a batch size to a batch of random images.
        title: description of the model and the image size.
    """

    cfg: CfgNode
    model: nn.Module
    stages: Stages
    batches: Callable[[int], Any]
    title: str


def assumption(cfg: CfgNode, error: UserError) -> str:
    """Return a note on a value that is assumed because data are not given or cannot be read."""
    return f"assumed, since the data cannot be read ({error})" if cfg.DATASETS.TRAIN else "assumed, without data"


def fitting_batch(subject: Subject) -> int:
    """Return the number of images per training step that fits into the free memory, 0 for none."""
    memory = Meter(subject.stages).memory(_step(subject, 1))
    return _fitting_batch(subject, sum(memory.values()))


def _fitting_batch(subject: Subject, memory: float) -> int:
    """Return the batch size that fits if an image needs ``memory`` bytes."""
    trained = sum(p.numel() for p in subject.model.parameters() if p.requires_grad)
    return max(int((USABLE * free_memory(subject.cfg.MODEL.DEVICE) - ADAMW * trained) / memory), 0)


def _step(subject: Subject, batch: int) -> Callable[[], Tensor]:
    """Return a function that computes the loss of ``batch`` images, after a warm-up."""
    cfg, model = subject.cfg, subject.model.train()
    precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE))

    def loss() -> Tensor:
        torch.manual_seed(0)
        with precision.autocast(), EventStorage():
            outputs = model(subject.batches(batch))
        return torch.stack([v.float() for name, v in outputs.items() if name.startswith("loss")]).sum()

    loss().backward()
    return loss


def cost_table(subject: Subject, batch: int | None) -> str:
    """Measure a model; return a table, the batch size that fits and the time of the schedule, as text.

    Args:
        subject: the model.
        batch: images per measured step; None: the config's, at most what fits and ``LARGEST``.
    """
    cfg, model = subject.cfg, subject.model
    precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE))
    meter = Meter(subject.stages)
    fits = _fitting_batch(subject, sum(meter.memory(_step(subject, 1)).values()))
    part = -(-cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.GRAD_ACCUM_STEPS)
    batch = batch or max(min(part, fits, LARGEST), 1)
    loss = _step(subject, batch)
    memory, flops = meter.memory(loss), meter.flops(loss)
    counts, seconds = meter.parameters(model), meter.seconds(loss, cfg.MODEL.DEVICE)
    for values in (counts, flops, memory):
        values[ALL] = sum(values.values())
    rows = [
        (
            name,
            f"{counts[name] / 1e6:.2f}",
            f"{flops[name] / batch / 1e9:.2f}",
            f"{memory[name] / batch / 2**20:.0f}",
            f"{batch / seconds[name]:.{2 if name == ALL else 1}f}" if seconds[name] > 1e-5 else "-",
        )
        for name in [*subject.stages, REST, ALL]
    ]
    heads = ("stage", "parameters, M", "GFLOP/image", "memory, MiB/image", "images/s")
    return (
        f"{subject.title}, {precision.name} on {device_name(cfg.MODEL.DEVICE)}, batches of {batch}\n\n"
        f"{tabulate(rows, heads, stralign='right', disable_numparse=True)}\n\n"
        f"{_advice(cfg, fits)}\n{_schedule_time(cfg, seconds[ALL] / batch)}"
    )


def _advice(cfg: CfgNode, fits: int) -> str:
    """Return whether the config's batches fit into the free memory, and otherwise the keys with which they do."""
    images, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.GRAD_ACCUM_STEPS
    free = f"{free_memory(cfg.MODEL.DEVICE) / 2**30:.1f} GiB of free memory"
    if not fits:
        return f"Not one image fits into {free}: set MODEL.ACTIVATION_CHECKPOINT True or use smaller images."
    if images <= fits * parts:
        return f"Batches of SOLVER.IMS_PER_BATCH {images} images fit into {free}."
    parts = next(n for n in range(parts, images + 1) if images % n == 0 and images <= fits * n)
    return (
        f"Batches of SOLVER.IMS_PER_BATCH {images} images do not fit into {free}, about {fits} at a time do: "
        f"set SOLVER.GRAD_ACCUM_STEPS {parts}."
    )


def _schedule_time(cfg: CfgNode, seconds: float) -> str:
    """Return the time of the whole schedule if an image takes ``seconds``."""
    total = timedelta(seconds=round(seconds * cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.MAX_ITER))
    return (
        f"{cfg.SOLVER.MAX_ITER} iterations (SOLVER.MAX_ITER) take about {total} (h:mm:ss) in one process, without "
        "loading of images, optimizer steps and evaluation."
    )


def step_cost(subject: Subject, batch: int) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass, and the bytes that it keeps, both per image."""
    meter, loss = Meter(subject.stages), _step(subject, batch)
    seconds = meter.seconds(loss, subject.cfg.MODEL.DEVICE)[ALL]
    return seconds / batch, sum(meter.memory(loss).values()) / batch


class Meter:
    """Attributes the cost of a forward pass to the innermost running stage.

    Args:
        stages: by name an object, a module or not, and the names of its methods that run the stage. Stages can be
            nested.
    """

    def __init__(self, stages: Stages) -> None:
        self._modules = {name: owner for name, (owner, *_) in stages.items() if isinstance(owner, nn.Module)}
        self._running = [REST]
        self._read: Callable[[], float] = lambda: 0.0
        self._sums: dict[str, float] = defaultdict(float)
        self._last = 0.0
        for name, (owner, *methods) in stages.items():
            for method in methods:
                setattr(owner, method, partial(self._run, name, getattr(owner, method)))

    def _run(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._switch(lambda: self._running.append(name))
        try:
            return method(*args, **kwargs)
        finally:
            self._switch(self._running.pop)

    def _switch(self, change: Callable[[], Any]) -> None:
        now = self._read()
        self._sums[self._running[-1]] += now - self._last
        self._last = now
        change()

    def _measure(self, read: Callable[[], float], run: Callable[[], Any]) -> dict[str, float]:
        self._read, self._sums, self._last = read, defaultdict(float), read()
        run()
        self._switch(lambda: None)
        return self._sums

    def memory(self, run: Callable[[], Tensor]) -> dict[str, float]:
        """Return the bytes that each stage keeps for the backward pass, without parameters."""
        seen = {p.untyped_storage().data_ptr() for stage in self._modules.values() for p in stage.parameters()}
        total = [0.0]

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total[0] += storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            return self._measure(lambda: total[0], run)

    def flops(self, run: Callable[[], Tensor]) -> dict[str, float]:
        """Return the FLOPs of each stage's forward pass."""
        with FlopCounterMode(display=False) as counter:
            return self._measure(lambda: float(counter.get_total_flops()), run)

    def seconds(self, run: Callable[[], Tensor], device: str) -> dict[str, float]:
        """Return the minimum seconds of each stage's forward pass, and under ``ALL`` of forward and backward pass."""

        def clock() -> float:
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            return time.perf_counter()

        best: dict[str, float] = defaultdict(lambda: float("inf"))
        for _ in range(REPEATS):
            losses: list[Tensor] = []
            start = clock()
            forward = self._measure(clock, lambda losses=losses: losses.append(run()))  # type: ignore[misc]
            losses[0].backward()
            for name, value in {**forward, ALL: clock() - start}.items():
                best[name] = min(best[name], value)
        return defaultdict(float, best)

    def parameters(self, model: nn.Module) -> dict[str, float]:
        """Return the number of parameters of each stage, without those of nested stages."""
        own = {name: {id(p): p.numel() for p in module.parameters()} for name, module in self._modules.items()}
        for name, module in self._modules.items():
            for other, inner in self._modules.items():
                if inner is not module and any(inner is m for m in module.modules()):
                    own[name] = {k: v for k, v in own[name].items() if k not in own[other]}
        counts: dict[str, float] = defaultdict(float)
        counts |= {name: sum(values.values()) for name, values in own.items()}
        counts[REST] = sum(p.numel() for p in model.parameters()) - sum(counts.values())
        return counts
