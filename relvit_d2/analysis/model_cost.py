"""The cost of a model, stage by stage: parameters, operations, memory, speed, and the batch that fits."""

import time
from collections import defaultdict
from collections.abc import Callable
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

ADAMW = 16  # bytes a trained parameter: itself, its gradient and AdamW's two averages, float32
SPARE = 0.8  # share of the free memory that activations may fill; the backward pass needs some of its own
REPEATS = 3
REST = "rest"  # what runs outside of the stages

Stages = dict[str, tuple[Any, ...]]


class Subject(NamedTuple):
    """A model whose cost is measured.

    Attributes:
        cfg: its config.
        model: returns a dict with losses for a batch.
        stages: objects by name, and the names of the methods that are a stage's work; see :class:`Meter`.
        batches: returns a batch of so many random images.
        title: the model and the size of its images.
    """

    cfg: CfgNode
    model: nn.Module
    stages: Stages
    batches: Callable[[int], Any]
    title: str


def assumption(cfg: CfgNode, error: UserError) -> str:
    """Return the words on something that is assumed because data cannot be read.

    Raises:
        UserError: the ``error`` of reading, if no data are named.
    """
    if not cfg.DATASETS.TRAIN:
        raise error
    return f"assumed, since the data cannot be read ({error})"


def cost_table(subject: Subject, batch: int) -> str:
    """Return the table of a model's cost and the sentence on the batch that fits.

    Args:
        subject: what is measured.
        batch: images of the measured pass.
    """
    cfg, model = subject.cfg, subject.model
    precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE))
    model.train()
    meter = Meter(subject.stages)

    def loss(images: int) -> Tensor:
        torch.manual_seed(0)
        with precision.autocast(), EventStorage():
            outputs = model(subject.batches(images))
        return torch.stack([v.float() for name, v in outputs.items() if name.startswith("loss")]).sum()

    loss(batch).backward()  # kernels are chosen and compiled
    kept = meter.kept(lambda: loss(batch))
    operations = meter.operations(lambda: loss(batch))
    seconds, step = meter.seconds(lambda: loss(batch), cfg.MODEL.DEVICE)
    counts = meter.parameters(model)
    rows = [
        (
            name,
            f"{counts[name] / 1e6:.2f}",
            f"{operations[name] / batch / 1e9:.2f}",
            f"{kept[name] / batch / 2**20:.0f}",
        )
        + ((f"{batch / seconds[name]:.1f}" if seconds[name] > 1e-5 else "-"),)
        for name in [*subject.stages, REST]
    ]
    total = sum(operations.values()) / batch / 1e9, sum(kept.values()) / batch / 2**20
    rows.append(
        ("all", f"{sum(counts.values()) / 1e6:.2f}", f"{total[0]:.2f}", f"{total[1]:.0f}", f"{batch / step:.2f}")
    )
    heads = ("stage", "parameters, M", "GFLOP/image", "kept, MiB/image", "images/s")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    free = free_memory(cfg.MODEL.DEVICE)
    fits = max(int((SPARE * free - ADAMW * trained) / (total[1] * 2**20)), 0)
    return (
        f"{subject.title}, {precision.name} on {device_name(cfg.MODEL.DEVICE)}\n\n"
        f"{tabulate(rows, heads, stralign='right', disable_numparse=True)}\n\n"
        f"{free / 2**30:.1f} GiB are free: about {fits} images a batch fit with AdamW"
        f"{'' if fits else '; set MODEL.ACTIVATION_CHECKPOINT True or smaller images'}. "
        "Larger batches: SOLVER.GRAD_ACCUM_STEPS."
    )


class Meter:
    """Attributes what a pass costs to the stage that runs, the innermost one.

    Args:
        stages: objects by name, modules or not, and the methods that are a stage's work; one may lie in another.
    """

    def __init__(self, stages: Stages) -> None:
        self._modules = {name: owner for name, (owner, *_) in stages.items() if isinstance(owner, nn.Module)}
        self._running = [REST]
        self._read: Callable[[], float] = lambda: 0.0
        self._sums: dict[str, float] = defaultdict(float)
        self._mark = 0.0
        for name, (owner, *methods) in stages.items():
            for method in methods:
                setattr(owner, method, partial(self._run, name, getattr(owner, method)))

    def _run(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._turn(lambda: self._running.append(name))
        try:
            return method(*args, **kwargs)
        finally:
            self._turn(self._running.pop)

    def _turn(self, change: Callable[[], Any]) -> None:
        now = self._read()
        self._sums[self._running[-1]] += now - self._mark
        self._mark = now
        change()

    def _measure(self, read: Callable[[], float], run: Callable[[], Any]) -> dict[str, float]:
        self._read, self._sums, self._mark = read, defaultdict(float), read()
        run()
        self._turn(lambda: None)
        return self._sums

    def kept(self, run: Callable[[], Tensor]) -> dict[str, float]:
        """Return the bytes that each stage keeps for the backward pass, parameters not counted."""
        own = {p.untyped_storage().data_ptr() for stage in self._modules.values() for p in stage.parameters()}
        seen, total = set(own), [0.0]

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total[0] += storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            return self._measure(lambda: total[0], run)

    def operations(self, run: Callable[[], Tensor]) -> dict[str, float]:
        """Return the floating-point operations of each stage's forward pass."""
        with FlopCounterMode(display=False) as counter:
            return self._measure(lambda: float(counter.get_total_flops()), run)

    def seconds(self, run: Callable[[], Tensor], device: str) -> tuple[dict[str, float], float]:
        """Return the seconds of each stage's forward pass and of a whole forward and backward pass, fastest ones."""

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
            for name, value in {**forward, "step": clock() - start}.items():
                best[name] = min(best[name], value)
        step = best.pop("step")
        return defaultdict(float, best), step

    def parameters(self, model: nn.Module) -> dict[str, int]:
        """Return the parameters of each stage, those of stages within it left out."""
        own = {name: {id(p): p.numel() for p in module.parameters()} for name, module in self._modules.items()}
        for name, module in self._modules.items():
            for other, inner in self._modules.items():
                if inner is not module and any(inner is m for m in module.modules()):
                    own[name] = {k: v for k, v in own[name].items() if k not in own[other]}
        counts = defaultdict(int, {name: sum(values.values()) for name, values in own.items()})
        counts[REST] = sum(p.numel() for p in model.parameters()) - sum(counts.values())
        return counts
