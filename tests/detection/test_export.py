"""Exported detectors: equal to the model, usable without torch, quantised."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.structures import Boxes
from PIL import Image
from torch import nn

from relvit_d2.cli import main
from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.detection import backbone as backbones
from relvit_d2.detection.comparison import compare, matched
from relvit_d2.detection.detections import Detections
from relvit_d2.detection.export import file_resizing, preprocessing, to_onnx
from relvit_d2.detection.onnx_detector import OnnxDetector, paste_masks
from relvit_d2.detection.predictor import load_detector
from relvit_d2.detection.quantization import quantize
from relvit_d2.utils.errors import UserError
from tests.support.detectors import tiny_config, write_run

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = """
import sys
for name in ("torch", "torchvision", "detectron2", "timm"):
    sys.modules[name] = None
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth images of several sizes and aspect ratios; some are enlarged, some are reduced for the network."""
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(64, 64), (48, 80), (80, 48), (70, 66), (100, 90), (120, 64), (60, 150)]):
        Image.fromarray(smooth(number, *size)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def unresized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the network's size, of which the model and the file see the same pixels."""
    folder = tmp_path_factory.mktemp("unresized")
    for number, size in enumerate([(64, 64), (64, 85), (93, 64)]):
        Image.fromarray(smooth(number, *size)).save(folder / f"{number}.png")
    return folder


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """Return an image of coloured spots."""
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 12 + 1, width // 12 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def detector_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", tiny_config("MODEL.MASK_ON", True))


@pytest.fixture(scope="module")
def exported(detector_run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the command, which compares the detections."""
    path = tmp_path_factory.mktemp("exported") / "detector.onnx"
    export(detector_run, path, "--images", images)
    return path


def export(run: Path, path: Path, *more: object) -> None:
    words = ("export-model", "--weights", run, "--to", "onnx", "--output", path, *more)
    assert main([*map(str, words)]) == 0


def failing(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail with one sentence, which is returned."""
    assert main([*map(str, words)]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


def test_the_file_has_standard_operators_and_its_settings(exported: Path, detector_run: Path) -> None:
    model = onnx.load(exported)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert {"NonMaxSuppression", "RoiAlign", "Resize"} <= {node.op_type for node in model.graph.node}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(ROOT).encode() not in exported.read_bytes()
    metadata = OnnxDetector(exported).metadata
    assert metadata["class_names"] == [f"class {i}" for i in range(10)]
    assert (metadata["short_side"], metadata["longest_side"], metadata["mask_size"]) == (64, 96, 28)
    assert [file.name for file in exported.parent.iterdir()] == ["detector.onnx"]


def test_images_that_the_command_did_not_compare(exported: Path, detector_run: Path) -> None:
    """Sizes from one row of cells to a large image, and an image without detections."""
    model, file = load_detector(detector_run, threshold=0.0), OnnxDetector(exported, threshold=0.0, threads=1)
    model.network_input = file_resizing(model)  # type: ignore[method-assign]
    for size in [(64, 64), (8, 96), (400, 30), (333, 500)]:
        assert "detections, largest differences" in compare(model, file, [smooth(9, *size)], 0.05, limit=20)
    none = OnnxDetector(exported, threshold=1.0)(np.zeros((64, 64, 3), np.uint8))
    assert len(none.boxes) == 0 and none.masks == []


def test_predict_without_torch(exported: Path, detector_run: Path, unresized: Path, tmp_path: Path) -> None:
    """Pictures, json and labels are those of the model."""
    thresholds = ["0.1", "class 3=0.9", "class 4=0.12"]
    words = ["--input", str(unresized), "--threshold", *thresholds, "--save-labels", "labelme", "--output"]
    call = ["predict", "--model", str(exported), *words, str(tmp_path / "onnx")]
    code = f"{HIDDEN}\nfrom relvit_d2.cli import main\nsys.exit(main({call!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 pictures" in done.stdout
    assert main(["predict", "--weights", str(detector_run), *words, str(tmp_path / "torch")]) == 0
    theirs, ours = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("torch", "onnx"))
    assert len(ours) == len(theirs) > 20
    for expected, found in zip(theirs, ours, strict=True):
        assert found.keys() == expected.keys() and "segmentation" in found
        assert (found["image_id"], found["category"]) == (expected["image_id"], expected["category"])
        assert found["score"] == pytest.approx(expected["score"], abs=1e-3)
        assert found["bbox"] == pytest.approx(expected["bbox"], abs=0.5)
    for file in unresized.glob("*.png"):
        label_files = [tmp_path / name / f"labels_labelme/{file.stem}.json" for name in ("torch", "onnx")]
        classes = [[shape["label"] for shape in json.loads(path.read_text())["shapes"]] for path in label_files]
        rows = [row["category"] for row in ours if row["image_id"] == str(file)]
        assert list(dict.fromkeys(classes[0])) == list(dict.fromkeys(classes[1])) == list(dict.fromkeys(rows))
    for picture in (tmp_path / "torch").glob("*.png"):
        pair = [np.asarray(Image.open(tmp_path / name / picture.name), float) for name in ("torch", "onnx")]
        assert np.abs(pair[0] - pair[1]).mean() < 1


def test_the_example_of_the_documentation(exported: Path, images: Path, tmp_path: Path) -> None:
    words = [str(ROOT / "docs/examples/onnx_detect.py"), str(exported), str(images / "5.png"), "out.png", "0.1"]
    code = f"{HIDDEN}\nimport runpy\nsys.argv = {words!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines, expected = done.stdout.splitlines(), OnnxDetector(exported, 0.1)(images / "5.png")
    assert len(lines) == len(expected.scores) > 0
    assert lines[0].startswith(f"class {expected.classes[0]} {expected.scores[0]:.3f} ")
    assert Image.open(tmp_path / "out.png").size == Image.open(images / "5.png").size


def test_bad_input_is_one_sentence(
    exported: Path, detector_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(model: Path, *more: object) -> str:
        return failing(capsys, "predict", "--model", model, "--input", images, "--output", tmp_path / "out", *more)

    other, damaged, nameless = (tmp_path / f"{name}.onnx" for name in ("other", "damaged", "nameless"))
    onnx.save(onnx.parser.parse_model(preprocessing(tiny_config(), 8)), other)
    damaged.write_bytes(exported.read_bytes()[:1000])
    model = onnx.load(exported)
    kept = [entry for entry in model.metadata_props if entry.key != "class_names"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, nameless)
    assert "other.onnx' is an ONNX model of another program" in predict(other)
    assert "damaged.onnx' is not an ONNX model that can be loaded" in predict(damaged)
    assert "nameless.onnx' lacks the metadata 'class_names'" in predict(nameless)
    assert "absent.onnx' does not exist" in predict(tmp_path / "absent.onnx")
    assert "--threshold 2" in predict(exported, "--threshold", 2)
    assert "give either --weights or --model" in predict(exported, "--weights", detector_run)
    assert "give --input, without" in predict(exported, "MODEL.DEVICE", "cpu")
    assert "cannot be created" in predict(exported, "--output", exported / "out")
    assert not (tmp_path / "out").exists()

    def export(*words: object) -> str:
        return failing(capsys, "export-model", "--output", tmp_path / "x.onnx", "--weights", *words)

    assert "absent' do not exist" in export(tmp_path / "absent")
    assert "does not end in .onnx" in export(detector_run, "--output", tmp_path / "x.pt")
    assert re.search(r"folder .*none.* does not exist", export(detector_run, "--output", tmp_path / "none/x.onnx"))
    (tmp_path / "few").mkdir()
    shutil.copy(images / "0.png", tmp_path / "few")
    assert "has 1 images, at least 8 are needed" in export(detector_run, "--int8", tmp_path / "few")
    assert "--min-agreement 2.0: give 0 to 1" in export(detector_run, "--min-agreement", 2)
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.slow
def test_an_int8_file_is_smaller_and_refused_if_it_disagrees(exported: Path, images: Path, tmp_path: Path) -> None:
    target, files = tmp_path / "int8.onnx", sorted(images.iterdir())
    with pytest.raises(UserError, match=r"agrees .* below --min-agreement 1.01: .* was not written"):
        quantize(exported, target, files, 1.01)
    assert not list(tmp_path.iterdir())
    assert "agreement with float32 in 3 other images: F1 " in quantize(exported, target, files, 0.3)
    assert target.stat().st_size < 0.5 * exported.stat().st_size
    assert OnnxDetector(target).metadata == OnnxDetector(exported).metadata


class Fixed(SimpleNamespace):
    """A detector with the same detections in every image."""

    found: Detections

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        return [self.found] * len(images)


def found(*scores: float, shift: float = 0, classes: int = 0) -> Fixed:
    boxes = np.array([[40 * i + shift, 0, 40 * i + 30, 30] for i in range(len(scores))], np.float32).reshape(-1, 4)
    return Fixed(found=Detections(boxes, np.array(scores), np.full(len(scores), classes), None))


def test_other_detections_are_refused() -> None:
    image = [np.zeros((50, 200, 3), np.uint8)]
    limits = (0.05, 3)  # score, detections
    assert compare(found(0.9, 0.5), found(0.9001, 0.5, shift=0.4), image, *limits).startswith("2 detections")
    assert compare(found(0.9, 0.0505), found(0.9), image, *limits).startswith("1 detections")
    assert compare(found(0.9, 0.8, 0.7), found(0.9, 0.8), image, *limits).startswith("2 detections")
    for other in (found(0.9), found(0.9, 0.5, shift=0.6), found(0.9, 0.502), found(0.9, 0.5, classes=1)):
        with pytest.raises(UserError, match="differ from the model's in an image of 200 x 50 pixels"):
            compare(found(0.9, 0.5), other, image, *limits)
    with pytest.raises(UserError, match="finds nothing"):
        compare(found(), found(), image, *limits)


def test_padding_to_squares_is_refused(detector_run: Path) -> None:
    detector = load_detector(str(detector_run), "", ["MODEL.PYRAMID.SIZE_DIVISIBILITY", "256"])
    with pytest.raises(UserError, match=r"cannot be exported: add MODEL\.PYRAMID\.SIZE_DIVISIBILITY 0"):
        to_onnx(detector)


def test_each_detection_has_at_most_one_partner() -> None:
    one = found(0.9).found
    twice = Detections(one.boxes.repeat(2, axis=0), one.scores.repeat(2), one.classes.repeat(2), None)
    assert matched(one, twice) == [(0, 0)] and matched(twice, one) == [(0, 0)]


@pytest.mark.parametrize(
    "keys",
    [(), ("INPUT.MIN_SIZE_TEST", 200, "INPUT.MAX_SIZE_TEST", 250), ("INPUT.MIN_SIZE_TEST", 0), ("INPUT.FORMAT", "BGR")],
)
def test_images_are_resized_normalised_and_padded_like_the_models(keys: tuple[object, ...]) -> None:
    cfg = tiny_config(*keys)
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(preprocessing(cfg, 8)).SerializeToString())
    mapper = DetectionMapper(cfg, is_train=False)
    mean, std = (np.array(values)[:, None, None] for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    for size in ((150, 211), (300, 70), (33, 240), (64, 64)):
        image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
        (pixels,), new, original = session.run(None, {"image": image})
        expected = mapper.network_input(image).numpy()
        height, width = expected.shape[1:]
        assert new.tolist() == [height, width] and original.tolist() == list(size)
        assert pixels.shape[1:] == (-(-height // 8) * 8, -(-width // 8) * 8)
        levels = pixels[:, :height, :width] * std + mean
        assert np.abs(levels - expected).max() < 2.1 and (np.abs(levels - expected) > 0.1).mean() < 0.05
        assert not pixels[:, height:].any() and not pixels[:, :, width:].any()


def test_masks_are_pasted_like_detectron2s() -> None:
    draw = np.random.default_rng(0)
    masks = draw.random((20, 28, 28), dtype=np.float32)
    corners = draw.uniform(0, 40, (20, 2))
    boxes = np.concatenate((corners, corners + draw.uniform(0.5, 60, (20, 2))), axis=1).clip(0, 70).astype(np.float32)
    expected = paste_masks_in_image(torch.from_numpy(masks), Boxes(torch.from_numpy(boxes)), (70, 80)).numpy()
    ours = np.stack([mask.whole(70, 80) for mask in paste_masks(masks, boxes, 70, 80)])
    assert (ours != expected).mean() < 1e-4 and ours.any()


def test_the_subsampled_level_equals_max_pooling_with_stride_2() -> None:
    maps = torch.randn(2, 3, 7, 4)
    (level,) = backbones.SubsampledLevel("p5")(maps)
    assert torch.equal(level, nn.functional.max_pool2d(maps, kernel_size=1, stride=2))
