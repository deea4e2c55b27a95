"""Fine-tuning of a classifier compared with timm's training loop on the same model.

``finetune_32_p4_compute`` is the speed-up of a training step without data loading and augmentation: forward, loss,
backward, clipping and optimizer. ``finetune_32_p4`` is the speed-up of whole iterations: our trainer, which keeps small
images decoded in memory and augments whole batches, against timm's training loop (its ``train.py``: create_model,
create_optimizer_v2, create_loader with two workers, autocast, dispatch_clip_grad) with the same random resized crop
and flip. ``finetune_32_p4_data`` is the fraction of the time of our iterations spent waiting for data. The images are
JPEGs of smoothed noise; decoding them before the first iteration is not counted.
"""

import argparse
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from fvcore.common.config import CfgNode
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from benchmarks.harness import Row, arguments, in_turn, print_rows
from benchmarks.pretrain import QUICK_BATCH, TIMED, WARM, draw_images
from relvit_d2.classification.model import build_classifier
from relvit_d2.classification.run import build_trainer, load_data, resolve_config
from relvit_d2.engine.optimizer import build_clipper, build_optimizer
from relvit_d2.engine.precision import choose_precision
from relvit_d2.tasks import load_config
from relvit_d2.utils.randomness import seed_everything

NAME, SIDE, PATCH, BATCH = "finetune_32_p4", 32, 4, 256
CLASSES, IMAGES = 10, 1024
WORKERS = 2  # of timm's data loader


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "classifier")
    logging.disable(logging.WARNING)
    batch = QUICK_BATCH if args.quick else BATCH
    with tempfile.TemporaryDirectory() as folder:
        for label in range(CLASSES):
            draw_images(Path(folder) / f"train/{label}", (SIDE, SIDE), -(-IMAGES // CLASSES), label)
        print_rows(measure(batch, Path(folder), args), args)


def measure(batch: int, folder: Path, args: argparse.Namespace) -> list[Row]:
    """Return the rows."""
    cfg = config(batch, folder, args.device)
    precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(args.device))
    more = {"batch": batch, "precision": precision.name}
    images = torch.randn(batch, 3, SIDE, SIDE, device=args.device)
    labels = torch.randint(CLASSES, (batch,), device=args.device)
    ours_step, timm_train = our_step(cfg), timm_step(cfg)
    pair = in_turn(
        lambda: ours_step(images, labels), lambda: timm_train(images, labels), args.device, 10.0 if args.quick else 30.0
    )
    rows: list[Row] = [
        {"name": f"{NAME}_compute", "ratio": pair.ratio, **more, "ours_s": pair.ours, "timm_s": pair.theirs}
    ]
    ours, waiting = trained(cfg)
    theirs = looped(cfg, folder, timm_train)
    speed = {"ours_images_per_s": batch / ours, "timm_images_per_s": batch / theirs}
    rows.insert(0, {"name": NAME, "ratio": theirs / ours, **more, **speed})
    rows.append({"name": f"{NAME}_data", "ratio": waiting, **more})
    return rows


def config(batch: int, folder: Path, device: str) -> CfgNode:
    """Return the config of CIFAR-10 with the generated images."""
    values: dict[str, Any] = {
        "MODEL.DEVICE": device,
        "MODEL.WEIGHTS": "",
        "INPUT.VIEW.CROP": "resized",
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.MAX_ITER": WARM + TIMED,
        "SOLVER.WARMUP_ITERS": 1,
        "TEST.EVAL_PERIOD": 0,
        "DATASETS.TRAIN": (str(folder / "train"),),
        "DATASETS.TEST": (),
        "DATASETS.VALIDATION": "",
        "OUTPUT_DIR": str(folder / "out"),
    }
    return load_config("configs/cls/cifar10_vit_s4.yaml", [str(part) for pair in values.items() for part in pair])


def our_step(cfg: CfgNode) -> Callable[[Tensor, Tensor], float]:
    """Return a function that trains our model on normalised images and labels and returns the loss."""
    model = build_classifier(cfg, CLASSES).train()
    optimizer, clip = build_optimizer(cfg, model), build_clipper(cfg, model)
    precision = choose_precision(cfg.SOLVER.PRECISION, model.device)

    def step(images: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad()
        with precision.autocast():
            loss = nn.functional.cross_entropy(model.network(images)[0], labels)
        loss.backward()
        clip()
        optimizer.step()
        return loss.item()

    return step


def timm_step(cfg: CfgNode) -> Callable[[Tensor, Tensor], float]:
    """Return a function like a step of timm's ``train.py`` (train_one_epoch) on normalised images and labels."""
    solver = cfg.SOLVER
    shape: dict[str, Any] = {"img_size": SIDE, "patch_size": PATCH, "drop_path_rate": 0.1}
    model = timm.create_model("vit_small_patch16_224", num_classes=CLASSES, **shape)
    model = model.to(cfg.MODEL.DEVICE).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    precision, criterion = choose_precision(solver.PRECISION, torch.device(cfg.MODEL.DEVICE)), nn.CrossEntropyLoss()

    def step(images: Tensor, labels: Tensor) -> float:
        with precision.autocast():
            loss = criterion(model(images), labels)
        loss.backward()
        dispatch_clip_grad(model.parameters(), solver.CLIP_GRADIENTS.CLIP_VALUE, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def trained(cfg: CfgNode) -> tuple[float, float]:
    """Train; return the minimum seconds of an iteration and the fraction of the time spent waiting for data."""
    data = load_data(cfg, training=True)
    seed_everything(cfg.SEED, "model")
    build_trainer(cfg, build_classifier(resolve_config(cfg, data), data.classes), data).train()
    rows = [
        json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text(encoding="utf-8").splitlines()
    ][WARM:]
    took, waited = ([row[name] for row in rows] for name in ("time", "data_time"))
    return min(took), sum(waited) / sum(took)


def looped(cfg: CfgNode, folder: Path, step: Callable[[Tensor, Tensor], float]) -> float:
    """Return the minimum seconds of an iteration of timm's loop with timm's loader."""
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    loader = create_loader(
        create_dataset("", root=str(folder), split="train", is_training=True),
        (3, SIDE, SIDE),
        cfg.SOLVER.IMS_PER_BATCH,
        is_training=True,
        use_prefetcher=on_gpu,
        scale=tuple(cfg.INPUT.VIEW.SCALE),
        ratio=(3 / 4, 4 / 3),
        hflip=cfg.INPUT.VIEW.FLIP,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=WORKERS,
        persistent_workers=True,
        device=torch.device(cfg.MODEL.DEVICE),
    )

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in itertools.count():
            yield from loader

    took, batches = [], endless()
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        images, labels = next(batches)
        step(images.to(cfg.MODEL.DEVICE), labels.to(cfg.MODEL.DEVICE))
        took.append(time.perf_counter() - start)
    return min(took[WARM:])


if __name__ == "__main__":
    main()
