"""Regression test: the first losses of every encoder in every stage equal the recorded ones in ``tests/golden``.

``--write-golden`` records them again.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

import relvit_d2.classification.run as classification
import relvit_d2.detection.run as detection
import relvit_d2.pretraining.run as pretraining
from relvit_d2.analysis.run_comparison import Losses, compare, read_losses
from relvit_d2.classification.model import build_classifier
from relvit_d2.data.classification.image_folder import LabelledImages
from relvit_d2.detection.model import build_detector
from relvit_d2.encoders import ENCODERS, build_encoder
from relvit_d2.engine.checkpoint import Checkpointer
from relvit_d2.engine.trainer import Trainer
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import load_config
from relvit_d2.utils.randomness import seed_everything

Model = TypeVar("Model", bound=nn.Module)
GOLDEN = Path(__file__).parent / "golden"
# Relative. Measured: other kernels (scalar, AVX2, SSE4.1 oneDNN, portable MKL, two threads) change a loss by up to
# 7e-7, a learning rate 1 % higher by at least 3e-4.
TOLERANCE = 2e-5
ITERATIONS = 4

SHARED = {
    "DATASETS.TRAIN": ("svhn_train",),
    "DATASETS.TEST": (),
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.DEVICE": "cpu",
    "MODEL.ENCODER.IMG_SIZE": 64,
    # torch's Bernoulli numbers depend on the processor's vendor.
    "MODEL.ENCODER.DROP_PATH": 0.0,
    "SOLVER.PRECISION": "float32",
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.BASE_LR": 1e-3,
    "SOLVER.REFERENCE_BATCH": 0,
}


def pretraining_trainer(encoder: str, overrides: dict[str, object]) -> Trainer:
    _, stride = patch_and_stride(encoder)
    size = {"PRETEXT.IMAGE_SIZE": 4 * stride, "SOLVER.IMS_PER_BATCH": 4}
    cfg = config("configs/base/ssl.yaml", encoder, size | overrides)
    files = pretraining.image_files("DATASETS.TRAIN", cfg.DATASETS.TRAIN, skip_missing=False)
    seed_everything(cfg.SEED, "model")
    return pretraining.build_trainer(cfg, without_dropout(build_pretraining_model(cfg)), files, [])


def detection_trainer(encoder: str, overrides: dict[str, object]) -> Trainer:
    _, last = patch_and_stride(encoder)
    strides = [last // 2, last]
    levels = [f"p{stride.bit_length() - 1}" for stride in strides]
    # All anchors become proposals and all proposals are trained on: a selection by score would depend on rounding.
    every = 10_000
    # Few anchors and narrow heads, since the gradient of a ReLU near zero depends on rounding.
    small = {
        "SOLVER.IMS_PER_BATCH": 2,
        "MODEL.PYRAMID.NAME": "simple",
        "MODEL.PYRAMID.STRIDES": strides,
        "MODEL.PYRAMID.OUT_CHANNELS": 16,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[12], [24]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.5]],
        "MODEL.RPN.IN_FEATURES": levels,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.RPN.NMS_THRESH": 1.0,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": every,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": every,
        "MODEL.ROI_HEADS.IN_FEATURES": levels,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": every,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    }
    unresolved = config("configs/demo/streets.yaml", encoder, small | overrides)
    records = detection.training_records(unresolved)
    cfg = detection.resolve_config(unresolved, records)
    seed_everything(cfg.SEED, "model")
    return detection.build_trainer(cfg, without_dropout(build_detector(cfg)), records, {})


def classification_trainer(encoder: str, overrides: dict[str, object]) -> Trainer:
    _, stride = patch_and_stride(encoder)
    view = {"INPUT.VIEW.SIZE": 2 * stride, "INPUT.VIEW.CROP": "resized", "SOLVER.IMS_PER_BATCH": 4}
    cfg = config("configs/base/cls.yaml", encoder, view | overrides)
    files = pretraining.image_files("DATASETS.TRAIN", cfg.DATASETS.TRAIN, skip_missing=False)
    labelled = LabelledImages("street numbers", files, torch.arange(len(files)) % 3, ("a", "b", "c"))
    data = classification.ClassificationData(labelled, None, None)
    seed_everything(cfg.SEED, "model")
    return classification.build_trainer(cfg, without_dropout(build_classifier(cfg, data.classes)), data)


STAGES: dict[str, Callable[[str, dict[str, object]], Trainer]] = {
    "pretraining": pretraining_trainer,
    "detection": detection_trainer,
    "classification": classification_trainer,
}


@cache
def patch_and_stride(encoder: str) -> tuple[int, int]:
    """Return the encoder's default patch size and the stride of its last map, in pixels."""
    built = build_encoder(encoder)
    return built.arguments["patch_size"], built.strides[built.last]


def without_dropout(model: Model) -> Model:
    """Switch off dropout that has no key; see ``DROP_PATH`` above."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def config(path: str, encoder: str, overrides: dict[str, object]) -> CfgNode:
    patch, _ = patch_and_stride(encoder)
    values = SHARED | {"MODEL.ENCODER.NAME": encoder, "MODEL.ENCODER.PATCH_SIZE": patch} | overrides
    return load_config(path, [str(part) for pair in values.items() for part in pair])


Train = Callable[[str, str, dict[str, object]], Losses]


@pytest.fixture
def train(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run a stage of an encoder with overrides of the config; return its losses."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    monkeypatch.setattr(Checkpointer, "save", lambda *args, **more: None)  # ViT-B's is a gigabyte

    def run(stage: str, encoder: str, overrides: dict[str, object]) -> Losses:
        STAGES[stage](encoder, {"OUTPUT_DIR": tmp_path, **overrides}).train()
        return read_losses(tmp_path)

    return run


def golden_file(stage: str, encoder: str) -> Path:
    return GOLDEN / f"{stage}_{encoder}.json"


def write_command(stage: str, encoder: str) -> str:
    return f"python -m pytest tests/test_golden.py --write-golden -k 'golden_ones and {stage}-{encoder}'"


def golden(stage: str, encoder: str) -> Losses:
    path = golden_file(stage, encoder)
    if not path.exists():
        pytest.fail(f"{path} is missing; write it with: {write_command(stage, encoder)}", pytrace=False)
    return read_losses(path)


# It runs the code of the smaller ViTs, and takes as long as all others together.
SLOW = "vit_base"
PAIRS = [
    pytest.param(stage, encoder, marks=[pytest.mark.slow] * (encoder == SLOW))
    for stage in STAGES
    for encoder in ENCODERS
]


@pytest.mark.parametrize(("stage", "encoder"), PAIRS)
def test_losses_are_the_golden_ones(stage: str, encoder: str, train: Train, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--write-golden"):
        losses = train(stage, encoder, {})
        rows = [json.dumps({"iteration": step, **values}) + "\n" for step, values in losses.items()]
        golden_file(stage, encoder).write_text("".join(rows))
        return
    expected = golden(stage, encoder)
    found = compare(expected, train(stage, encoder, {}), TOLERANCE)
    if found.differences:
        lines = [f"A is {golden_file(stage, encoder)}, B is this run", *found.differences]
        pytest.fail("\n".join([*lines, f"to record the new losses: {write_command(stage, encoder)}"]), pytrace=False)
    assert found.steps == ITERATIONS


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("change", [{"SOLVER.BASE_LR": 1.01e-3}, {"SEED": 1}], ids=["rate", "seed"])
def test_a_small_change_is_detected(stage: str, change: dict[str, object], train: Train) -> None:
    assert compare(golden(stage, "vit_nano"), train(stage, "vit_nano", change), TOLERANCE).differences


def test_a_missing_golden_file_is_reported_with_its_command() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"detection_vit_new\.json is missing.*--write-golden"):
        golden("detection", "vit_new")


def test_there_are_no_unused_golden_files() -> None:
    known = {golden_file(stage, encoder) for stage in STAGES for encoder in ENCODERS}
    assert not set(GOLDEN.iterdir()) - known
