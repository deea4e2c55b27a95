"""Small classifiers and their configs."""

import json
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from relvit_d2.classification.model import ClassificationModel, build_classifier
from relvit_d2.classification.run import (
    ClassificationData,
    build_trainer,
    finish,
    load_data,
    resolve_config,
)
from relvit_d2.tasks import load_config
from relvit_d2.utils.randomness import seed_everything

SMALL: dict[str, object] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.ENCODER.NAME": "vit_nano",
    "MODEL.ENCODER.IMG_SIZE": 16,
    "MODEL.ENCODER.PATCH_SIZE": 8,
    "MODEL.WEIGHTS": "",
    "INPUT.VIEW.SIZE": 16,
    "INPUT.VIEW.PAD": 2,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.REFERENCE_BATCH": 0,
    "SOLVER.BASE_LR": 1e-3,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.PRECISION": "float32",
    "TEST.EVAL_PERIOD": 2,
    "DATALOADER.NUM_WORKERS": 0,
    "DATASETS.VALIDATION": "25%",
}


def command(trees: Path, output: Path, *more: object, flags: tuple[object, ...] = ()) -> tuple[object, ...]:
    """A short run on the images of ``draw_trees``."""
    data = {"DATASETS.TRAIN": f"('{trees}/train',)", "DATASETS.TEST": f"('{trees}/test',)", "OUTPUT_DIR": output}
    given = [part for pair in (SMALL | data).items() for part in pair]
    return ("train_cls.py", "--config-file", "configs/cls/cifar10_vit_s4.yaml", *flags, *given, *more)


def config(trees: Path, output: Path, *overrides: object) -> CfgNode:
    data = {"DATASETS.TRAIN": f"('{trees}/train',)", "DATASETS.TEST": f"('{trees}/test',)", "OUTPUT_DIR": output}
    given = [part for pair in (SMALL | data).items() for part in pair]
    values = [str(value) for value in (*given, *overrides)]
    return load_config("configs/cls/cifar10_vit_s4.yaml", values, "classification")


def trained(cfg: CfgNode) -> tuple[ClassificationModel, ClassificationData, dict[str, Any]]:
    """Train like the command; return the results that it wrote."""
    data = load_data(cfg, training=True)
    cfg = resolve_config(cfg, data)
    seed_everything(cfg.SEED, "model")
    model = build_classifier(cfg, data.classes)
    trainer = build_trainer(cfg, model, data)
    trainer.train()
    finish(cfg, model, trainer, data)
    return model, data, json.loads((Path(cfg.OUTPUT_DIR) / "inference/results.json").read_text())
