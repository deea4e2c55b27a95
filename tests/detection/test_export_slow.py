"""Exports that take minutes: every kind of encoder, and a trained detector."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.export import Dim

from relvit_d2.cli import main
from relvit_d2.data.detection.coco import load_coco
from relvit_d2.detection.detections import AnyDetector
from relvit_d2.detection.onnx_detector import OnnxDetector
from relvit_d2.detection.predictor import load_detector
from relvit_d2.encoders import build_encoder
from relvit_d2.encoders.swin import Swin
from relvit_d2.evaluation.coco import CocoStyleEvaluator
from tests.support.detectors import tiny_config, write_run
from tests.support.scripts import run

pytestmark = pytest.mark.slow

SMALL = ("MODEL.PYRAMID.OUT_CHANNELS", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16)
LEVELS = ("MODEL.RPN.IN_FEATURES", ["p3", "p4"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"])
SIZES = ("INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 288)  # maps of a Swin with and without shifted windows

KINDS = ("vit_small", "swin_tiny", "t2t_vit_14", "windowed", "relative", "rotary")


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", [*KINDS, "timm:test_convnext", "timm:test_resnet"])
def test_every_encoder_is_exported_for_any_size(
    name: str, masks: bool, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command compares detections in crops of photographs, so of different sizes."""
    variant = name in ("windowed", "relative", "rotary")
    windows = ("MODEL.ENCODER.WINDOW", 3, "MODEL.ENCODER.GLOBAL_BLOCKS", 2) if variant else ()
    encoder = {"rotary": "timm:vit_tiny_patch16_dinov3_qkvb"}.get(name, "vit_nano" if variant else name)
    patch = 16 if variant else build_encoder(name).arguments["patch_size"]
    keys = ("MODEL.ENCODER.NAME", encoder, "MODEL.ENCODER.PATCH_SIZE", patch, "MODEL.MASK_ON", masks, *windows)
    keys += ("MODEL.ENCODER.REL_POS", name == "relative")
    strides = ("MODEL.PYRAMID.STRIDES", [4, 8, 16, 32], "MODEL.ENCODER.IMG_SIZE", 128)
    detector = write_run(tmp_path / "run", tiny_config(*keys, *strides, *SMALL, *LEVELS, *SIZES))
    if name == "relative":  # zero at the start
        content = torch.load(detector / "model_final.pth", weights_only=True)
        for table in (value for key, value in content["model"].items() if "rel_pos" in key):
            table.normal_(std=0.3)
        torch.save(content, detector / "model_final.pth")
    words = ["export-model", "--weights", detector, "--output", tmp_path / "x.onnx"]
    assert main([*map(str, words), "--images", str(samples / "VOC2007/JPEGImages")]) == 0
    printed = capsys.readouterr().out
    print(printed)
    count = re.search(r"equal to the model in 8 .*: (\d+) detections", printed)
    assert count and int(count[1]) > 50
    assert ("masks" in printed) == masks


def test_a_swin_is_exported_for_maps_of_any_size(tmp_path: Path) -> None:
    """Also for maps not larger than a window, whose windows are not shifted."""
    encoder = Swin(12, (2, 2), (2, 2), 4, 0.0, 0.0, 3).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    rows, cols = Dim("rows", min=2), Dim("cols", min=2)
    images = (torch.randn(1, 3, 80, 72),)
    program = torch.export.export(encoder, images, dynamic_shapes=({2: 8 * rows, 3: 8 * cols},))
    names: dict[str, Any] = {"input_names": ["images"], "output_names": list(encoder.strides)}
    torch.onnx.export(program, f=str(tmp_path / "x.onnx"), dynamo=True, external_data=False, verbose=False, **names)
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    for size in ((80, 72), (16, 88), (56, 56), (24, 24), (120, 64), (8, 8)):
        image = torch.randn(1, 3, *size)
        found = session.run(None, {"images": image.numpy()})
        for level, expected in zip(found, encoder(image).values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(level), expected, rtol=1e-4, atol=1e-4)


def average_precision(detector: AnyDetector, records: list[dict[str, Any]], folder: Path) -> tuple[float, float]:
    """Return the AP of boxes and of masks, in percent."""
    evaluator = CocoStyleEvaluator("coco", records, detector.class_names, folder, ignore_difficult=True)
    evaluator.reset()
    for record in records:
        (found,) = detector.detect([detector.read(record["file_name"])])
        size = record["height"], record["width"]
        instances = Instances(size, pred_boxes=Boxes(torch.from_numpy(found.boxes)))
        instances.scores, instances.pred_classes = torch.from_numpy(found.scores), torch.from_numpy(found.classes)
        masks = [mask.whole(*size) for mask in found.masks or ()]
        instances.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *size))
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()
    return results["bbox"]["AP"], results["segm"]["AP"]


def test_the_exported_file_has_the_ap_of_a_trained_model(samples: Path, tmp_path: Path) -> None:
    """The detector overfits ten images, so that its AP would show missing or moved detections."""
    records = load_coco(samples / "coco/annotations/instances_val2017.json", samples / "coco/val2017")[:10]
    short = "INPUT.MIN_SIZE_TRAIN (128,) INPUT.MAX_SIZE_TRAIN 160 INPUT.MIN_SIZE_TEST 128 INPUT.MAX_SIZE_TEST 160"
    model = "MODEL.MASK_ON True MODEL.ENCODER.IMG_SIZE 160 MODEL.ROI_MASK_HEAD.CONV_DIM 32"
    solver = "SOLVER.MAX_ITER 300 SOLVER.IMS_PER_BATCH 4 SOLVER.REFERENCE_BATCH 0 SOLVER.BASE_LR 1e-3"
    words = f"{short} {model} {solver} SOLVER.WARMUP_ITERS 30 SOLVER.PRECISION float32 INPUT.RANDOM_FLIP none".split()
    words += ["DATASETS.TRAIN", "('coco_2017_val[:10]',)", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "0"]
    run(samples, "relvit-d2", "train", "--config-file", "configs/custom.yaml", *words, "OUTPUT_DIR", tmp_path / "run")
    path = tmp_path / "detector.onnx"
    assert main(["export-model", "--weights", str(tmp_path / "run"), "--output", str(path)]) == 0
    detector = load_detector(tmp_path / "run", overrides=["MODEL.DEVICE", "cpu"], threshold=0.0)
    expected = average_precision(detector, records, tmp_path / "torch")
    found = average_precision(OnnxDetector(path, 0.0), records, tmp_path / "onnx")
    assert expected[0] > 50 and expected[1] > 15
    assert found == pytest.approx(expected, abs=0.1)
