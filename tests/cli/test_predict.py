"""Prediction on files, arrays and videos, in Python and from the command line."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from detectron2.structures import BoxMode, Instances
from PIL import Image

from relvit_d2 import load_detector
from relvit_d2.cli import main, parser_of
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.detection.predictor import Detector
from relvit_d2.detection.thresholds import parse_thresholds
from relvit_d2.report.prediction_files import input_files
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import yolo_folder
from tests.support.scripts import command, fails, run
from tests.support.videos import video

Failing = Callable[..., str]


@pytest.fixture(scope="module")
def trained(root: Path) -> Iterator[Path]:
    """The folder of a hardly trained detector that returns detections of any score."""
    run(root, *command("train_net.py", root / "run", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        yield root / "run"


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    return load_detector(trained, threshold=0.0)


@pytest.fixture(scope="module")
def images(root: Path) -> list[Path]:
    return sorted((root / "svhn/test").glob("*.png"))


@pytest.fixture()
def failing(trained: Path, capsys: pytest.CaptureFixture[str]) -> Failing:
    """Run relvit-d2 predict in this process; it must fail with one sentence, which is returned."""

    def call(*arguments: object, weights: Path = trained) -> str:
        assert main(["predict", "--weights", *map(str, (weights, *arguments))]) == 1
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in "".join(lines)
        return errors[0]

    return call


def same(a: Instances, b: Instances) -> None:
    assert len(a) == len(b) > 0 and a.image_size == b.image_size
    for name in ("pred_classes", "scores"):
        np.testing.assert_allclose(a.get(name).numpy(), b.get(name).numpy(), atol=1e-4)
    np.testing.assert_allclose(a.pred_boxes.tensor.numpy(), b.pred_boxes.tensor.numpy(), atol=1e-3)


def test_a_loaded_detector_detects_like_evaluation(trained: Path, detector: Detector, images: list[Path]) -> None:
    written = json.loads((trained / "inference/coco_instances_results.json").read_text())
    assert len(written) > 50
    for image in images:
        expected = [row for row in written if str(row["image_id"]) == image.stem]
        found = detector(image)
        assert len(found) == len(expected)
        boxes = BoxMode.convert(found.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).numpy()
        np.testing.assert_allclose(boxes, [row["bbox"] for row in expected], atol=1e-4)
        np.testing.assert_allclose(found.scores.numpy(), [row["score"] for row in expected], atol=1e-4)
        assert found.pred_classes.tolist() == [row["category_id"] for row in expected]
        assert found.image_size == Image.open(image).size[::-1]
    assert detector.class_names == list("0123456789")


def test_detectron2s_predictor_has_the_same_detections(
    trained: Path, detector: Detector, images: list[Path], tmp_path: Path
) -> None:
    """The example of the documentation in a new process, on an image that neither of them resizes."""
    unresized = tmp_path / "64.png"
    Image.open(images[0]).convert("RGB").resize((80, 64)).save(unresized)
    page = Path(__file__).resolve().parents[2] / "docs/weights.md"
    (code,) = re.findall(r"```python\n(.+?)```", page.read_text(), re.DOTALL)
    code = code.replace("output/voc_vit_s", str(trained)).replace("image.jpg", str(unresized))
    code += "\nprint(instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), instances.pred_classes.tolist())"
    python = [sys.executable, "-c", code]
    done = subprocess.run(python, capture_output=True, text=True, check=True, cwd=page.parents[1])
    boxes, scores, classes = json.loads("[" + done.stdout.strip().splitlines()[-1].replace("] [", "], [") + "]")
    expected = detector(unresized)
    assert len(expected) == len(boxes) > 5
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor.numpy(), atol=1e-4)
    np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-4)
    assert classes == expected.pred_classes.tolist()


def test_results_of_variants_are_written_and_expected_results_set_the_exit_status(
    trained: Path, root: Path, tmp_path: Path
) -> None:
    def evaluation(output: Path, expected: object, *more: object) -> tuple[object, ...]:
        weights = ("MODEL.WEIGHTS", trained / "model_final.pth", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
        keys = ("TEST.AUG.ENABLED", True, "TEST.EXPECTED_RESULTS", expected)
        return command("train_net.py", output, *weights, *keys, *more, flags=("--eval-only",))

    plain = json.loads((trained / "inference/results.json").read_text())["svhn_test"]
    right = [["bbox", "AP", plain["bbox"]["AP"], 1e-6], ["bbox_TTA", "AP50", 50.0, 50.0]]
    sizes = ("TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.MAX_SIZE", 96, "TEST.TILES", 1000)
    done = run(root, *evaluation(tmp_path / "a", right, *sizes))
    assert "Results verification passed" in done.stdout
    results = json.loads((tmp_path / "a/inference/results.json").read_text())["svhn_test"]
    assert set(results) == set(plain) | {f"{task}_{variant}" for task in plain for variant in ("TTA", "tiles")}
    assert results["bbox_tiles"] == plain["bbox"]  # tiles are larger than the images
    assert results["bbox"] == plain["bbox"] and results["bbox_TTA"].keys() == plain["bbox"].keys()
    files = [tmp_path / "a/inference" / folder / "coco_instances_results.json" for folder in (".", "TTA")]
    assert files[0].read_text() == (trained / "inference/coco_instances_results.json").read_text()
    assert json.loads(files[1].read_text()) and files[0].read_text() != files[1].read_text()

    wrong = [["bbox", "AP", 99.0, 0.5], ["segm", "AP", 1.0, 100.0]]
    off = ("TEST.AUG.ENABLED", False, "TEST.TILES", "auto")
    sentence = fails(root, *evaluation(tmp_path / "b", wrong, *off))
    assert "results differ from TEST.EXPECTED_RESULTS: bbox/AP is" in sentence
    assert "expected 99.0 +- 0.5, segm/AP is None, expected 1.0 +- 100.0" in sentence
    assert json.loads((tmp_path / "b/inference/results.json").read_text())["svhn_test"]["bbox"] == plain["bbox"]
    assert (tmp_path / "b/inference/tiles/coco_instances_results.json").is_file()
    sentence = fails(root, *command("train_net.py", tmp_path / "c", "TEST.EXPECTED_RESULTS", wrong))
    assert "bbox/AP is" in sentence and (tmp_path / "c/model_final.pth").is_file()


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_paths_arrays_images_and_batches_give_the_same(detector: Detector, images: list[Path]) -> None:
    together = detector.batch(images)
    for path, expected in zip(images, together, strict=True):
        with Image.open(path) as picture:
            for image in (path, str(path), picture, np.array(picture.convert("RGB"))):
                same(detector(image), expected)
    for bad in (np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(UserError, match="is not an image"):
            detector(bad)


def test_pillow_images_are_read_like_files(detector: Detector, images: list[Path], tmp_path: Path) -> None:
    with Image.open(images[0]) as picture:
        gray = np.array(picture.convert("L"))
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as picture:
            same(detector(picture), detector(path))
    assert detector(tmp_path / "turned.jpg").image_size == gray.shape[::-1]
    with pytest.raises(UserError, match="float32 numbers, whose range is unknown"):
        detector(Image.fromarray(gray.astype(np.float32)))


def test_a_checkpoint_and_its_folder_load_the_same_detector(
    trained: Path, detector: Detector, images: list[Path]
) -> None:
    same(load_detector(trained / "model_final.pth", threshold=0.0)(images[0]), detector(images[0]))


def test_predict_draws_every_input_and_writes_coco_results(
    root: Path, trained: Path, detector: Detector, images: list[Path], tmp_path: Path
) -> None:
    # Equal names: in another folder, with another suffix.
    other = tmp_path / "other"
    other.mkdir()
    with Image.open(images[0]) as picture:
        picture.save(other / images[0].name)
        picture.convert("RGB").save(other / f"{images[0].stem}.bmp")
    made = video(tmp_path / "clip.mp4", [np.full((47, 61, 3), 40 * i, np.uint8) for i in range(5)])
    pattern = f"{images[0].parent}/*.png"
    arguments = ("--input", pattern, other, made, "--output", tmp_path / "out", "--threshold", 0, "--batch", 2)
    done = run(root, "relvit-d2", "predict", "--weights", trained, *arguments)
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(pictures) == len(images) + 2
    assert f"{len(pictures)} pictures and 1 video" in done.stdout
    for file in pictures:
        assert max(Image.open(file).size) >= 800
    results = json.loads((tmp_path / "out/detections.json").read_text())
    for name in (*map(str, images), str(other / images[0].name), str(other / f"{images[0].stem}.bmp")):
        rows = [row for row in results if row["image_id"] == name]
        expected = detector(name)
        np.testing.assert_allclose([row["score"] for row in rows], expected.scores.numpy(), atol=1e-4)
        assert [row["category"] for row in rows] == [detector.class_names[i] for i in expected.pred_classes]
    assert {row["image_id"] for row in results if "#" in row["image_id"]} == {f"{made}#{i}" for i in range(5)}
    with av.open(str(tmp_path / "out/clip.mp4")) as written:
        frames = [frame.to_ndarray(format="rgb24") for frame in written.decode(video=0)]
    assert len(frames) == 5
    assert frames[0].mean() < frames[-1].mean()


@pytest.mark.parametrize("name", ["my [1] in", "a*b", "plain"])
def test_an_input_is_a_pattern_only_if_it_does_not_exist(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file in ("1.png", "2.mp4", "[3].jpg", "4.txt"):
        (folder / file).touch()
    assert input_files(f"{folder}/*.png") == [folder / "1.png"]
    assert input_files(f"{folder}/*") == sorted(folder / file for file in ("1.png", "2.mp4", "[3].jpg"))
    assert input_files(f"{folder}/[12].*") == [folder / "1.png", folder / "2.mp4"]
    assert input_files(f"{folder}/[3].jpg") == [folder / "[3].jpg"]
    for nothing in ("*.webp", "4.txt"):
        with pytest.raises(UserError, match="--input"):
            input_files(f"{folder}/{nothing}")


def test_a_whole_folder_is_done_or_reported(root: Path, trained: Path, images: list[Path], tmp_path: Path) -> None:
    """Videos and images of all kinds beside invalid ones: all other results are written."""
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    with Image.open(images[0]) as picture:
        for name in ("a.gif", "b.jfif", "c.JPG", "deep/d.png", "z.webp"):
            picture.convert("RGB").save(folder / name)
        picture.convert("F").save(folder / "e.tif")
        picture.convert("I").save(folder / "f.tif")
    np.save(folder / "g.npy", np.zeros((20, 20, 5), np.uint8))
    np.save(folder / "h.npy", np.full((20, 20, 3), np.nan))
    clip = video(folder / "deep/clip.mp4", [np.full((32, 32, 3), 50, np.uint8)] * 2)
    arguments = ("--input", folder, "--output", out, "--threshold", 0, "--batch", 2)
    done = run(root, "relvit-d2", "predict", "--weights", trained, *arguments, status=1)
    assert "5 pictures and 1 video" in done.stdout
    assert {path.name for path in out.iterdir()} == {*(f"{c}.png" for c in "abcdz"), "clip.mp4", "detections.json"}
    found = {row["image_id"] for row in json.loads((out / "detections.json").read_text())}
    names = ("a.gif", "b.jfif", "c.JPG", "deep/d.png", "z.webp")
    assert found == {*(str(folder / name) for name in names), f"{clip}#0", f"{clip}#1"}
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "4 of 10 inputs could not be read" in error
    assert all(f"{name}'" in error for name in ("e.tif", "f.tif", "g.npy", "h.npy"))


@pytest.mark.parametrize("kind", ["picture", "video"])
def test_a_full_disk_is_reported_without_a_hint_to_resume(
    root: Path, trained: Path, images: list[Path], tmp_path: Path, kind: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 240, 320, 3), dtype=np.uint8)
    made = video(tmp_path / "clip.mp4", list(noise)) if kind == "video" else images[0]
    command = ("relvit-d2", "predict", "--weights", trained, "--input", made, "--output", tmp_path / "out")
    sentence = fails(root, *command, fault="full:20000")
    assert "could not be written" in sentence and "free space or choose another folder" in sentence
    assert "--resume" not in sentence and not list((tmp_path / "out").iterdir())


def test_videos_are_skipped_by_detectors_of_other_channels(
    detector: Detector, failing: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = video(tmp_path / "clip.mp4", [np.full((32, 32, 3), 50, np.uint8)])
    monkeypatch.setattr(detector, "pixels", PixelFormat(1))
    monkeypatch.setattr("relvit_d2.detection.predictor.load_detector", lambda *_: detector)
    assert "clip.mp4' has 3 channels, but INPUT.CHANNELS is 1" in failing("--input", made, "--output", tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]


def test_detections_below_the_threshold_are_left_out(
    trained: Path, detector: Detector, images: list[Path], tmp_path: Path
) -> None:
    scores = detector(images[0]).scores
    middle = float(scores.median())
    arguments = ["--input", images[0], "--output", tmp_path, "--threshold", middle]
    assert main(["predict", "--weights", *map(str, (trained, *arguments))]) == 0
    results = json.loads((tmp_path / "detections.json").read_text())
    assert 0 < len(results) == int((scores >= middle).sum()) < len(scores)
    assert [row["score"] for row in results] == pytest.approx(
        load_detector(trained, threshold=middle)(images[0]).scores.tolist(), abs=1e-5
    )
    default = inspect.signature(load_detector).parameters["threshold"].default
    assert (default, {}) == parse_thresholds(parser_of("predict").get_default("threshold"))


def test_splits_and_overrides(trained: Path, images: list[Path], tmp_path: Path) -> None:
    def predicted(*arguments: object) -> dict[str, list[float]]:
        assert main(["predict", *map(str, ("--weights", trained, "--output", tmp_path / "out", *arguments))]) == 0
        scores: dict[str, list[float]] = {}
        for row in json.loads((tmp_path / "out/detections.json").read_text()):
            scores.setdefault(row["image_id"], []).append(row["score"])
        return scores

    low = ("--confidence-threshold", 0)
    held_out = predicted("--split", "val", *low)
    assert held_out.keys() == {str(image) for image in images} and len(max(held_out.values(), key=len)) > 3
    few = ("TEST.DETECTIONS_PER_IMAGE", 3)
    for line in (
        ("--split", "val", *low, *few),
        ("--input", *images, *few, *low),
        ("--input", *images, *low, "--opts", *few),
    ):
        assert predicted(*line) == {image: sorted(found)[::-1][:3] for image, found in held_out.items()}
    folder = yolo_folder(tmp_path / "cells", "train/a", "train/b", "val/c")
    for split, names in (("train", "ab"), ("val", "c")):
        found = predicted("--split", split, "--data", folder, *low)
        assert found.keys() == {f"{folder}/images/{split}/{name}.png" for name in names}


def test_weights_of_another_kind_are_named(failing: Failing, root: Path, images: list[Path], tmp_path: Path) -> None:
    ssl, out = tmp_path / "ssl", ("--input", images[0], "--output", tmp_path / "out")
    run(root, *command("pretrain_ssl.py", ssl, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2))
    for weights in (ssl, ssl / "model_final.pth"):
        sentence = failing(*out, weights=weights)
        assert f"'{ssl}' is a pre-training, which has an encoder but no detection heads" in sentence
        assert f"MODEL.WEIGHTS '{ssl}/encoder.safetensors'" in sentence
    final = command("train_net.py", tmp_path / "cut", "MODEL.WEIGHTS", ssl / "model_final.pth")
    for flags in ((), ("--eval-only",)):
        sentence = fails(root, *final[:3], *flags, *final[3:])
        assert f"set MODEL.WEIGHTS to '{ssl}/encoder.safetensors'" in sentence and "task pretrain" in sentence
    done = run(root, *command("train_net.py", tmp_path / "tuned", "MODEL.WEIGHTS", ssl, "SOLVER.MAX_ITER", 1))
    assert f"weights '{ssl}': 100.0% of the encoder's values matched" in done.stdout
    (tmp_path / "data/detector").mkdir(parents=True)
    (tmp_path / "data/detector/config.yaml").touch()
    for folder, instead in ((tmp_path, "the OUTPUT_DIR of a run"), (tmp_path / "data", f"'{tmp_path}/data/detector'")):
        sentence = failing(*out, weights=folder)
        assert f"'{folder}' is not the folder of a run, since it has no config.yaml: give {instead}" in sentence


def test_unreadable_files_are_reported_and_the_rest_is_predicted(
    failing: Failing, detector: Detector, images: list[Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(images[0].read_bytes()[:200])
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), dtype=np.uint8)
    clip = video(tmp_path / "clip.mp4", list(noise))
    data, middle = clip.read_bytes(), clip.stat().st_size // 2
    clip.write_bytes(data[:middle] + bytes(3000) + data[middle + 3000 :])
    out = tmp_path / "out"
    message = failing("--input", cut, images[0], clip, "--output", out, "--threshold", 0, "--batch", 1)
    assert message.startswith("error: 2 of 3 inputs could not be read: ")
    assert "cut.png" in message and "clip.mp4' is damaged after frame " in message
    rows = json.loads((out / "detections.json").read_text())
    assert len([row for row in rows if row["image_id"] == str(images[0])]) == len(detector(images[0]))
    with av.open(str(out / "clip.mp4")) as written:
        frames = len(list(written.decode(video=0)))
    assert 0 < frames < 20 and f"after frame {frames - 1} " in message
    assert {row["image_id"] for row in rows if "#" in row["image_id"]} == {f"{clip}#{i}" for i in range(frames)}
    assert {file.name for file in out.iterdir()} == {f"{images[0].stem}.png", "clip.mp4", "detections.json"}


def test_invalid_input_is_reported_in_one_sentence(failing: Failing, images: list[Path], tmp_path: Path) -> None:
    output = ("--output", tmp_path / "out")
    assert "absent" in failing("--input", images[0], *output, weights=tmp_path / "absent/model_final.pth")
    assert "holds no checkpoint" in failing(
        "--input", images[0], *output, "--config-file", "configs/demo/streets.yaml", weights=tmp_path
    )
    pretrained = ("--config-file", "configs/ssl/voc_vit_s.yaml")
    assert "is of the task pretrain, not detection" in failing("--input", images[0], *output, *pretrained)
    assert "absent.png" in failing("--input", tmp_path / "absent.png", *output)
    assert "--threshold 2" in failing("--input", images[0], *output, "--threshold", 2)
    assert "--batch 0" in failing("--input", images[0], *output, "--batch", 0)
    assert "give either --input or --split" in failing(*output)
    assert "give either --input or --split" in failing(*output, "--input", images[0], "--split", "val")
    assert "--data needs --split" in failing(*output, "--input", images[0], "--data", tmp_path)
    cells = yolo_folder(tmp_path / "cells", "train/a", "val/b")
    assert "has no split test: give --split with one of train, val" in failing(
        *output, "--split", "test", "--data", cells
    )
    assert "did you mean 'MODEL.DEVICE'" in failing("--input", images[0], "MODEL.DEVIC", "cpu", *output)
    cut = tmp_path / "cut.png"
    cut.write_bytes(images[0].read_bytes()[:200])
    assert "cut.png" in failing("--input", cut, *output)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"no video at all" * 20)
    assert "clip.mp4" in failing("--input", clip, *output)
    assert not [*tmp_path.glob("out/*")]
    assert "cut.png' cannot be created" in failing("--input", images[0], "--output", cut)
