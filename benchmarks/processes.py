"""Training with two processes on the CPU (gloo): speed, bytes that are exchanged, and options of DDP.

``processes_2`` is the images per second of two processes of one thread over those of one process of one thread:
pre-training of ViT-S on generated views, as many in each process. ``processes_2_O`` is the speed-up of an
option O of ``DistributedDataParallel`` over the default. ``sent_MiB`` is the data that both processes send in a step,
by the counters of Linux's loopback interface, and ``gradients_MiB`` the size of the gradients in float32. Rows
``exchange_MODEL`` have the gradients of other models: a process of N sends and receives 2 (N - 1) / N of them in a step
with a ring, and ``ratio`` is that amount in MiB for many processes. Nothing else may run on the machine.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Row, arguments, print_rows
from benchmarks.pretrain import config
from relvit_d2.detection.model import build_detector
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretraining.model import PretrainingModel, build_pretraining_model
from relvit_d2.tasks import load_config
from relvit_d2.utils.metrics import Metric

SIDE, PATCH, BATCH, STEPS = 32, 4, 8, 10
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "bucket_5": {"bucket_cap_mb": 5},
    "bucket_100": {"bucket_cap_mb": 100},
}
MODELS = ("ssl/voc_vit_s", "ssl/voc_swin_t", "ssl/voc_t2t_vit_14", "voc_vit_s", "voc_swin_t", "voc_t2t_vit_14")


class Losses(torch.nn.Module):
    """The losses of a pre-training model for views in their original order."""

    def __init__(self, model: PretrainingModel) -> None:
        super().__init__()
        self.encoder, self.task = model.encoder, model.task

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Return the sum of the losses of views ``(B, 3, H, W)``."""
        layout = PatchLayout.full(len(views), self.task.grid)
        losses = self.task(self.encoder.tokens(views), layout).values()
        return torch.stack([loss for loss in losses if not isinstance(loss, Metric)]).sum()


def sent() -> int:
    """Return the bytes that were sent through the loopback interface."""
    (line,) = (line for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines() if "lo:" in line)
    return int(line.split(":")[1].split()[8])


def train(rank: int, count: int, store: str, steps: int, results: Any) -> None:
    """Train in one of ``count`` processes with each option; the first one reports seconds and MiB of a step."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=count)
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(SIDE, PATCH, BATCH, Path(folder), "cpu", "float32")
    views = torch.randn(BATCH, 3, SIDE, SIDE)
    for name, options in OPTIONS.items() if count > 1 else (("", {}),):
        model = Losses(build_pretraining_model(cfg))
        parallel = DistributedDataParallel(model, broadcast_buffers=False, **options) if count > 1 else model
        optimizer = torch.optim.AdamW(model.parameters())
        took, amounts = [], []
        for _ in range(2 + steps):
            distributed.barrier()
            start, before = time.perf_counter(), sent()
            optimizer.zero_grad()
            parallel(views).backward()
            optimizer.step()
            distributed.barrier()
            took.append(time.perf_counter() - start)
            amounts.append(sent() - before)
        if rank == 0:
            results.put((name, statistics.median(took[2:]), statistics.median(amounts[2:]) / 2**20))
    distributed.destroy_process_group()


def measured(count: int, steps: int) -> dict[str, tuple[float, float]]:
    """Return seconds and MiB of a step with ``count`` processes by the options' names."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(train, (count, f"{folder}/store", steps, results), nprocs=count)
    rows = {}
    while not results.empty():
        name, seconds, amount = results.get()
        rows[name] = (seconds, amount)
    return rows


def mebibytes(model: torch.nn.Module) -> float:
    """Return the size of the gradients in float32, MiB."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * 4 / 2**20


def rows(args: argparse.Namespace) -> list[Row]:
    """Return the rows."""
    steps = STEPS // 2 if args.quick else STEPS
    alone, found = measured(1, steps)[""][0], measured(2, steps)
    default = found[""][0]
    images = {"one_images_per_s": BATCH / alone, "two_images_per_s": 2 * BATCH / default}
    made: list[Row] = [{"name": "processes_2", "ratio": 2 * alone / default, **images, "sent_MiB": found[""][1]}]
    made += [
        {"name": f"processes_2_{name}", "ratio": default / seconds, "sent_MiB": amount}
        for name, (seconds, amount) in found.items()
        if name
    ]
    for name in MODELS:
        cfg = load_config(f"configs/{name}.yaml", ["MODEL.DEVICE", "cpu"])
        size = mebibytes((build_pretraining_model if name.startswith("ssl/") else build_detector)(cfg))
        made.append({"name": f"exchange_{name}", "ratio": 2 * size, "gradients_MiB": size})
    return made


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "processes")
    print_rows(rows(args), args)


if __name__ == "__main__":
    main()
