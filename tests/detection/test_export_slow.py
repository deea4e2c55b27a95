"""Exports that take minutes: every kind of encoder, average precision on photographs, int8."""

import json
import re
from pathlib import Path

import pytest

from relvit_d2.cli import main
from relvit_d2.data.detection import catalog
from relvit_d2.detection.onnx_detector import OnnxDetector
from relvit_d2.encoders import build_encoder
from tests.support.detectors import evaluated, tiny_config, write_run
from tests.support.scripts import run

pytestmark = pytest.mark.slow

SMALL = ("MODEL.PYRAMID.OUT_CHANNELS", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16)
LEVELS = ("MODEL.RPN.IN_FEATURES", ["p3", "p4"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"])
SIZES = ("INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 288)  # a Swin does not shift windows on its small maps


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", ["vit_small", "swin_tiny", "t2t_vit_14", "windowed"])
def test_every_encoder_is_exported_for_any_size(
    name: str, masks: bool, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command compares detections in crops of photographs, so of different sizes."""
    windows = ("MODEL.ENCODER.WINDOW", 3, "MODEL.ENCODER.GLOBAL_BLOCKS", 2) if name == "windowed" else ()
    encoder = "vit_nano" if name == "windowed" else name
    patch = 16 if name == "windowed" else build_encoder(name).arguments["patch_size"]
    keys = ("MODEL.ENCODER.NAME", encoder, "MODEL.ENCODER.PATCH_SIZE", patch, "MODEL.MASK_ON", masks, *windows)
    strides = ("MODEL.PYRAMID.STRIDES", [4, 8, 16, 32], "MODEL.ENCODER.IMG_SIZE", 128)
    detector = write_run(tmp_path / "run", tiny_config(*keys, *strides, *SMALL, *LEVELS, *SIZES))
    words = ["export-model", "--weights", detector, "--output", tmp_path / "x.onnx"]
    assert main([*map(str, words), "--images", str(samples / "VOC2007/JPEGImages")]) == 0
    printed = capsys.readouterr().out
    print(printed)
    count = re.search(r"equal to the model in 8 .*: (\d+) detections", printed)
    assert count and int(count[1]) > 50
    assert ("masks" in printed) == masks


def test_average_precision_is_the_models_and_int8_is_close(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A detector that has learned a few photographs of COCO."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(samples))
    few = "('coco_2017_val[:8]',)"
    keys = ("DATASETS.TRAIN", few, "DATASETS.TEST", few, "MODEL.MASK_ON", True, "OUTPUT_DIR", tmp_path / "run")
    sizes = ("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", 128, "INPUT.MIN_SIZE_TEST", 96)
    solver = ("SOLVER.MAX_ITER", 400, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.CHECKPOINT_PERIOD", 400)
    limits = ("INPUT.MAX_SIZE_TEST", 128, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05)
    config = ("train_net.py", "--config-file", "configs/demo/streets.yaml")
    run(samples, *config, *keys, *sizes, *solver, *limits)
    path = tmp_path / "x.onnx"
    photos = samples / "coco/val2017"
    words = ["export-model", "--weights", tmp_path / "run", "--output", path, "--int8", photos, "--min-agreement", 0.3]
    assert main([*map(str, words)]) == 0
    expected = json.loads((tmp_path / "run/inference/results.json").read_text())["coco_2017_val[:8]"]
    records = catalog.get_records("coco_2017_val[:8]", False)
    results = {
        name: evaluated(OnnxDetector(file, 0.0), records, tmp_path / name)
        for name, file in (("float32", path), ("int8", path.with_stem("x_int8")))
    }
    print(capsys.readouterr().out, expected, results)
    assert expected["bbox"]["AP"] > 3
    for task in ("bbox", "segm"):
        assert results["float32"][task]["AP"] == pytest.approx(expected[task]["AP"], abs=0.1)
    assert results["int8"]["bbox"]["AP"] > expected["bbox"]["AP"] / 2
