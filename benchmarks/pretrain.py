"""Whole pre-training iterations, with data loading, in the project's trainer.

``pretrain_S`` is the speed-up over a plain pipeline: loader workers that loop over patches, all pair scores in memory,
attention without the fused kernel, float32. ``pretrain_S_of_ceiling`` is the FLOP rate of the model's matrix products
over that of one large product on the same hardware in the same precision. ``pretrain_S_data`` is the fraction of the
time spent waiting for data. On a GPU, the rows ``..._compiled`` have ``MODEL.COMPILE``, and ``peak_MiB`` is the memory
of the model and the iterations. ``pretrain_S_keep_K`` is the speed-up of ``PRETEXT.KEEP`` K over all tokens, in the
fastest precision. The images are JPEGs of smoothed noise.
"""

import argparse
import contextlib
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image, ImageFilter
from timm.layers import set_fused_attn
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Row, arguments, matrix_rate, print_rows
from benchmarks.plain import pair_loss_plain, plain_patches, plain_view
from relvit_d2.data.detection.mapper import ImageReader
from relvit_d2.data.images.pixel_cache import PixelCache
from relvit_d2.engine.optimizer import build_clipper, build_optimizer
from relvit_d2.engine.precision import choose_precision
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.resampling import random_boxes
from relvit_d2.pretext.task import RelationTask
from relvit_d2.pretext.views import PatchDraws, ViewConfig, draw_patches
from relvit_d2.pretraining.model import PretrainingModel, build_pretraining_model
from relvit_d2.pretraining.run import build_trainer
from relvit_d2.tasks import load_config
from relvit_d2.utils.metrics import Metric
from relvit_d2.utils.randomness import seed_everything

# name: (view size, patch size, (width, height) of the images, batch size), sizes in pixels
SETTINGS = {"32_p4": (32, 4, (32, 32), 256), "224_p16": (224, 16, (500, 375), 256)}
KEPT = (1.0, 0.5, 0.25)  # fractions of the tokens
QUICK_BATCH = 32
IMAGES = 512
TIMED = 3  # timed iterations, of which the fastest counts
WARM = 2  # warm-up iterations, as many as Detectron2's timer skips


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "pretrain")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    for name, (side, patch, size, batch) in SETTINGS.items():
        batch = QUICK_BATCH if args.quick else batch
        with tempfile.TemporaryDirectory() as folder:
            draw_images(Path(folder) / "images", size)
            rows += measure(name, side, patch, batch, Path(folder), args)
            rows += measure_subsets(name, side, patch, batch, Path(folder), args)
    print_rows(rows, args)


def draw_images(folder: Path, size: tuple[int, int], count: int = IMAGES, seed: int = 0) -> None:
    """Write ``count`` JPEGs of smoothed noise."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        noise = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        noise.filter(ImageFilter.GaussianBlur(2)).save(folder / f"{number:04}.jpg", quality=90)


def measure(name: str, side: int, patch: int, batch: int, folder: Path, args: argparse.Namespace) -> list[Row]:
    """Measure one setting."""
    device = torch.device(args.device)
    settings = [("float32", False)]
    if choose_precision("auto", device).dtype == torch.bfloat16:
        settings.append(("bfloat16", False))
    if device.type == "cuda":
        settings.append((settings[-1][0], True))
    rows: list[Row] = []
    more = {"batch": batch}
    fastest = float("inf")
    for precision, compiled in settings:
        cfg = config(side, patch, batch, folder, args.device, precision)
        cfg.MODEL.COMPILE, cfg.OUTPUT_DIR = compiled, f"{cfg.OUTPUT_DIR}_{compiled}"
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        rate = matrix_rate(args.device, dtype)
        took, waiting = trained(cfg, folder, TIMED)
        fastest = fastest if compiled else min(fastest, took)
        rate = max(rate, matrix_rate(args.device, dtype))
        share = flops(cfg) / took / rate
        suffix = ("" if precision == "float32" else "_bf16") + ("_compiled" if compiled else "")
        speed = {"images_per_s": batch / took, "matrix_GFLOP_per_s": rate / 1e9}
        if device.type == "cuda":
            speed["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
        rows.append({"name": f"pretrain_{name}{suffix}_of_ceiling", "ratio": share, **more, **speed})
        rows.append({"name": f"pretrain_{name}{suffix}_data", "ratio": waiting, **more})
    cfg = config(side, patch, batch, folder, args.device, "float32")
    plain = plain_iteration(cfg, sorted((folder / "images").glob("*.jpg")), TIMED)
    rows.insert(0, {"name": f"pretrain_{name}", "ratio": plain / fastest, **more, "ours_s": fastest, "plain_s": plain})
    return rows


def measure_subsets(name: str, side: int, patch: int, batch: int, folder: Path, args: argparse.Namespace) -> list[Row]:
    """Measure one setting with subsets of the tokens."""
    took: list[float] = []
    for keep in KEPT:
        cfg = config(side, patch, batch, folder, args.device, "auto")
        cfg.PRETEXT.KEEP, cfg.OUTPUT_DIR = keep, str(folder / f"keep_{keep:g}")
        took.append(trained(cfg, folder, TIMED)[0])
    return [
        {"name": f"pretrain_{name}_keep_{keep:g}", "ratio": took[0] / t, "batch": batch, "images_per_s": batch / t}
        for keep, t in zip(KEPT, took, strict=True)
    ]


def config(side: int, patch: int, batch: int, folder: Path, device: str, precision: str) -> CfgNode:
    """Return the base config of pre-training, ViT-S, at an image size."""
    values: dict[str, Any] = {
        "MODEL.DEVICE": device,
        "MODEL.ENCODER.PATCH_SIZE": patch,
        "MODEL.ENCODER.IMG_SIZE": side,
        "PRETEXT.IMAGE_SIZE": side,
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.REFERENCE_BATCH": 0,
        "SOLVER.PRECISION": precision,
        "DATASETS.TRAIN": (str(folder / "images"),),
        "DATASETS.TEST": (),
        "OUTPUT_DIR": str(folder / precision),
    }
    return load_config("configs/base/ssl.yaml", [str(part) for pair in values.items() for part in pair])


def trained(cfg: CfgNode, folder: Path, iterations: int) -> tuple[float, float]:
    """Train; return the minimum seconds of an iteration and the fraction of the time spent waiting for data."""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = WARM + iterations, 1
    files = sorted((folder / "images").glob("*.jpg"))
    seed_everything(cfg.SEED, "model")
    if cfg.MODEL.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(cfg, build_pretraining_model(cfg), files, files[:1])
    trainer.train()
    rows = [
        json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text(encoding="utf-8").splitlines()
    ][WARM:]
    took, waited = ([row[name] for row in rows] for name in ("time", "data_time"))
    return min(took), sum(waited) / sum(took)


def flops(cfg: CfgNode) -> float:
    """Return the FLOPs of the matrix products in encoder and heads per iteration, forward and backward."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    model, few = build_pretraining_model(cfg), 2
    side = cfg.PRETEXT.IMAGE_SIZE
    layout = PatchLayout.full(few, model.task.grid)
    with FlopCounterMode(display=False) as counter:
        losses = model.task(model.encoder.tokens(torch.randn(few, 3, side, side)), layout)
        sum(value for value in losses.values() if not isinstance(value, Metric)).backward()
    return counter.get_total_flops() / few * cfg.SOLVER.IMS_PER_BATCH


class LoopedViews(torch.utils.data.Dataset[Tensor]):
    """Views of the plain pipeline, computed one by one in a loader worker."""

    def __init__(self, files: list[Path], config: ViewConfig, longest: int) -> None:
        self._files, self._config, self._read = files, config, ImageReader(PixelCache(longest=longest))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        config, key = self._config, torch.tensor([index])
        image = self._read(self._files[index])
        (box,) = random_boxes(torch.tensor([image.shape[1:]]), config.crop_scale, config.crop_ratio, key).tolist()
        draws = PatchDraws(*(x[0] for x in draw_patches(config, key)))
        return plain_patches(plain_view(image, box, index % 2 == 0, config), config, draws)


def plain_iteration(cfg: CfgNode, files: list[Path], iterations: int) -> float:
    """Return the minimum seconds of an iteration of the plain pipeline."""
    set_fused_attn(enable=False)
    model = build_pretraining_model(cfg)
    set_fused_attn(enable=True)
    optimizer, clip = build_optimizer(cfg, model), build_clipper(cfg, model)
    dataset = LoopedViews(files, model.views.config, cfg.INPUT.LOAD_SIZE)
    batches = itertools.chain.from_iterable(
        itertools.repeat(DataLoader(dataset, cfg.SOLVER.IMS_PER_BATCH, shuffle=True, num_workers=2, drop_last=True))
    )
    took = []
    with contextlib.closing(_closing(batches)) as endless:
        for _ in range(WARM + iterations):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = plain_loss(model, next(endless).to(cfg.MODEL.DEVICE))
            loss.backward()
            clip()
            optimizer.step()
            loss.item()
            took.append(time.perf_counter() - start)
    return min(took[WARM:])


def _closing(batches: Iterator[Tensor]) -> Any:
    yield from batches


def plain_loss(model: PretrainingModel, views: Tensor) -> Tensor:
    """Return the sum of the losses, computed with the scores of all pairs in memory."""
    layout = PatchLayout.full(len(views), model.task.grid, views.device)
    tokens = model.encoder.tokens(views)
    losses = []
    for _, task in model.task.named_tasks():
        if isinstance(task, RelationTask):
            queries, keys = task.head(tokens)
            losses.append(pair_loss_plain(queries, keys, layout, task.kind)[0])
        else:
            losses.append(task(tokens, layout)[0])
    return torch.stack(losses).sum()


if __name__ == "__main__":
    main()
