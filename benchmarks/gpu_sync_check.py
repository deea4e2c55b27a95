"""Whether training iterations wait for the GPU, by torch's check ``torch.cuda.set_sync_debug_mode("error")``.

Trains ViT-S in pre-training and in classification on generated images. The first iteration that is checked follows two
others, which initialise libraries. Detection is left out: Detectron2's proposals and heads select boxes by value. The
exit status is 1 if an operation waits; its line is printed.
"""

import argparse
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.engine import HookBase

import relvit_d2
from benchmarks import classifier, pretrain
from relvit_d2.classification.model import build_classifier
from relvit_d2.classification.run import build_trainer as build_classification_trainer
from relvit_d2.classification.run import load_data, resolve_config
from relvit_d2.engine.trainer import Trainer
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.pretraining.run import build_trainer

STEPS = 10  # checked iterations
BATCH, IMAGES = 32, 128
AFTER = 2  # iterations after the checked ones, since the last one is saved, which copies the weights


class Check(HookBase):
    """Lets torch raise an error where an operation of the checked iterations waits."""

    trainer: Trainer

    def before_step(self) -> None:
        """Start with the first checked iteration."""
        if self.trainer.iter == pretrain.WARM:
            torch.cuda.set_sync_debug_mode("error")

    def after_step(self) -> None:
        """End after the last checked iteration."""
        if self.trainer.iter == pretrain.WARM + STEPS - 1:
            torch.cuda.set_sync_debug_mode("default")


def pretraining(folder: Path) -> Trainer:
    """Return the trainer of a pre-training."""
    pretrain.draw_images(folder / "images", (32, 32), IMAGES)
    cfg = pretrain.config(32, 4, BATCH, folder, "cuda", "float32")
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = pretrain.WARM + STEPS + AFTER, 1
    files = sorted((folder / "images").glob("*.jpg"))
    return build_trainer(cfg, build_pretraining_model(cfg), files, files[:1])


def classification(folder: Path) -> Trainer:
    """Return the trainer of a classification."""
    for label in range(2):
        pretrain.draw_images(folder / f"train/{label}", (32, 32), IMAGES // 2, label)
    cfg = classifier.config(BATCH, folder, "cuda")
    cfg.SOLVER.MAX_ITER = pretrain.WARM + STEPS + AFTER
    data = load_data(cfg, training=True)
    cfg = resolve_config(cfg, data)
    return build_classification_trainer(cfg, build_classifier(cfg, data.classes), data)


def waits(make: Callable[[Path], Trainer]) -> str:
    """Train; return the line of this package that waits for the GPU, empty if none does."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(Path(folder))
        trainer.register_hooks([Check()])
        try:
            trainer.train()
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            package = str(Path(relvit_d2.__file__).parent)
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(package)]
            return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser, without options."""
    return argparse.ArgumentParser(prog="python -m benchmarks.gpu_sync_check", description=__doc__)


def main() -> None:
    """Check and print."""
    build_parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.gpu_sync_check needs CUDA: run it on a machine with an NVIDIA GPU")
    logging.disable(logging.WARNING)
    found = {make.__name__: waits(make) for make in (pretraining, classification)}
    for name, line in found.items():
        print(f"{name}: {line or f'{STEPS} iterations do not wait for the GPU'}", flush=True)
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
