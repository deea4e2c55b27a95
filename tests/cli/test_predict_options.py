"""relvit-d2 predict: labels to correct, minimum scores by class, every N-th frame, cameras."""

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from relvit_d2.cli import main
from relvit_d2.report import prediction_videos
from tests.support.custom_data import read_all
from tests.support.detectors import tiny_config, write_run
from tests.support.scripts import ROOT, started, wait_for
from tests.support.videos import times, video

CLASSES = [f"class {number}" for number in range(10)]
Rows = list[dict[str, Any]]
Predict = Callable[..., Rows]
Failing = Callable[..., str]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an untrained detector, with detections of any score."""
    return write_run(tmp_path_factory.mktemp("run") / "run", tiny_config("TEST.DETECTIONS_PER_IMAGE", 20))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "more/a.png")):
        pixels = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 64 + number)).save(folder / name)
    return folder


@pytest.fixture()
def predict(weights: Path, tmp_path: Path) -> Predict:
    """Run the command in this process, and return its detections."""

    def call(*arguments: object) -> Rows:
        output = ("--output", tmp_path / "out")
        assert main(["predict", *map(str, ("--weights", weights, *output, *arguments))]) == 0
        return json.loads((tmp_path / "out/detections.json").read_text())

    return call


@pytest.fixture()
def failing(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Failing:
    """Run the command, which must fail with one sentence and without a file."""

    def call(*arguments: object) -> str:
        output = ("--output", tmp_path / "out")
        assert main(["predict", *map(str, ("--weights", weights, *output, *arguments))]) == 1
        assert not [*tmp_path.glob("out/*")]
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return error

    return call


def test_labels_have_the_detections_of_the_json(
    predict: Predict, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = predict("--input", images, "--threshold", 0, "--save-labels", "coco")
    labels = tmp_path / "out/labels_coco"
    assert f"labels in {labels}, to be copied into '{images}'" in capsys.readouterr().out
    assert [path.name for path in labels.iterdir()] == ["annotations.json"]
    document = json.loads((labels / "annotations.json").read_text())
    found = {image["id"]: image["file_name"] for image in document["images"]}
    assert sorted(found.values()) == ["a.png", "b.png", "more/a.png"] and len(rows) > 30
    assert [
        (str(images / found[entry["image_id"]]), entry["category_id"] - 1, entry["bbox"])
        for entry in document["annotations"]
    ] == [(row["image_id"], row["category_id"], pytest.approx(row["bbox"])) for row in rows]


def test_labels_of_images_without_detections(predict: Predict, images: Path, tmp_path: Path) -> None:
    assert predict("--input", images, "--threshold", 1, "--save-labels", "yolo") == []
    labels = tmp_path / "out/labels_yolo"
    files = {str(path.relative_to(labels)): path.read_text() for path in labels.rglob("*.txt")}
    assert files.pop("classes.txt").splitlines() == CLASSES
    assert files == dict.fromkeys(("a.txt", "b.txt", "more/a.txt"), "")


def test_each_class_has_its_minimum_score(predict: Predict, images: Path, tmp_path: Path) -> None:
    """In all outputs."""
    everything = predict("--input", images, "--threshold", 0)
    first, second = sorted({row["category"] for row in everything})[:2]
    middle = {
        name: float(np.median([row["score"] for row in everything if row["category"] == name]))
        for name in (first, second)
    }
    lowest = float(np.quantile([row["score"] for row in everything], 0.3))

    def expected(default: float, by_class: dict[str, float]) -> Rows:
        return [row for row in everything if row["score"] >= np.float32(by_class.get(row["category"], default))]

    for default, by_class in ((lowest, middle), (1.0, middle), (middle[first], {second: 0.0}), (0.5, {first: 0.0})):
        words = ([] if default == 0.5 else [default]) + [f"{name}={score}" for name, score in by_class.items()]
        found = predict("--input", images, "--threshold", *words)
        assert found == expected(default, by_class) and 0 < len(found) < len(everything)
    scores = (lowest, *(f"{name}={score}" for name, score in middle.items()))
    keys = ("TEST.DETECTIONS_PER_IMAGE", 20)  # may follow the scores
    labelled = predict("--input", images, "--save-labels", "coco", "--confidence-threshold", *scores, *keys)
    document = json.loads((tmp_path / "out/labels_coco/annotations.json").read_text())
    assert len(document["annotations"]) == len(labelled) == len(expected(lowest, middle))


@pytest.mark.parametrize("every", [3, 7])
def test_every_nth_frame_keeps_its_number_and_time(predict: Predict, tmp_path: Path, every: int) -> None:
    frames = [np.full((32, 48, 3), 25 * number, np.uint8) for number in range(8)]
    clip = video(tmp_path / "clip.mkv", frames, [2000, 4000, 1000, 6000, 2000, 2000, 9000, 2000])
    rows = predict("--input", clip, "--threshold", 0, "--every", every, "--batch", 2)
    kept = range(0, 8, every)
    expected = [times(clip)[number] for number in kept]
    assert {row["image_id"]: row["time"] for row in rows} == {
        f"{clip}#{number}": pytest.approx(seconds, abs=1e-5) for number, seconds in zip(kept, expected, strict=True)
    }
    assert times(tmp_path / "out/clip.mp4") == pytest.approx(expected, abs=2e-5)
    assert predict("--input", clip, "--threshold", 1, "--every", every) == []
    with av.open(str(tmp_path / "out/clip.mp4")) as written:
        brightness = [frame.to_ndarray(format="gray").mean() for frame in written.decode(video=0)]
    assert len(brightness) == len(kept) and (np.diff(brightness) > 10 * every).all()


# FFmpeg's generated picture at the speed of a camera; the number of the camera is its duration in seconds.
GENERATED: tuple[str, str, dict[str, str]] = ("lavfi", "testsrc=size=96x64:rate=25:duration={},realtime", {})
CAMERA = f"""
import sys
from relvit_d2.cli import main
from relvit_d2.report.prediction_videos import CAMERAS

CAMERAS[sys.platform] = {GENERATED!r}
sys.exit(main(sys.argv[1:]))
"""


def check_camera(folder: Path, number: int, every: int) -> int:
    """Check the files of a camera; return the number of frames."""
    assert {path.name for path in folder.iterdir()} == {f"{number}.mp4", "detections.json"}
    found = {row["image_id"]: row["time"] for row in json.loads((folder / "detections.json").read_text())}
    expected = [every * index / 25 for index in range(len(found))]
    assert found == {f"{number}#{every * index}": pytest.approx(time, abs=1e-5) for index, time in enumerate(expected)}
    assert times(folder / f"{number}.mp4") == pytest.approx(expected, abs=2e-5)
    return len(found)


@pytest.mark.skipif("lavfi" not in av.formats_available, reason="PyAV has no generated input")
def test_ctrl_c_ends_a_camera_and_its_files_are_whole(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ("predict", "--weights", weights, "--threshold", 0, "--output", tmp_path / "out", "--every", 20)
    with started(tmp_path, "-c", CAMERA, *words, "--input", 1000) as process:
        wait_for((tmp_path / f"out/.1000.mp4.{process.pid}.part").exists, process)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert "1 video" in output
    assert check_camera(tmp_path / "out", 1000, 20) > 0


@pytest.mark.skipif("lavfi" not in av.formats_available, reason="PyAV has no generated input")
def test_a_camera_may_end_itself(predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prediction_videos.CAMERAS, sys.platform, GENERATED)
    handler = signal.getsignal(signal.SIGINT)
    predict("--input", 1, "--threshold", 0, "--every", 5)
    assert check_camera(tmp_path / "out", 1, 5) == 5
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_camera_is_a_number_that_is_not_a_file(
    failing: Failing, predict: Predict, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = failing("--input", "77")
    assert "1 of 1 inputs could not be read: camera 77 cannot be opened (" in sentence
    assert "connect it, give another number, or record a video" in sentence
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, "77")
    assert {row["image_id"] for row in predict("--input", "77", "--threshold", 0)} == {
        "77/a.png",
        "77/b.png",
        "77/more/a.png",
    }


def test_invalid_options_are_one_sentence(failing: Failing, images: Path, tmp_path: Path) -> None:
    given = ("--input", images)
    for words in (("2",), ("-1",), ("nan",), ("high",), ("0.5", "class 1=2"), ("class 1=",), ("0.5", "class 1")):
        assert f"--threshold {words[-1]}: give 0 to 1" in failing(*given, "--threshold", *words)
    sentence = failing(*given, "--threshold", "0.5", "clas 1=0.7")
    assert "--threshold names the class 'clas 1', which is not one of class 0, class 1, class 2" in sentence
    assert "did you mean 'class 1'?" in sentence
    assert "give one score for all other classes" in failing(*given, "--threshold", "0.5", "0.6")
    assert "give one score for class 1" in failing(*given, "--threshold", "class 1=0.5", "class 1=0.6")
    assert "--every 0: give at least 1" in failing(*given, "--every", 0)
    clip = video(tmp_path / "clip.mp4", [np.full((32, 32, 3), 50, np.uint8)])
    sentence = failing(*given, clip, "--save-labels", "voc")
    assert f"--save-labels is for images, and '{clip}' is a video: save its frames as images" in sentence
    (tmp_path / "empty").mkdir()
    assert "contains no image" in failing("--input", tmp_path / "empty", "--save-labels", "voc")
    Image.new("RGB", (8, 8)).save(tmp_path / "empty/a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "empty/a.bmp")
    sentence = failing("--input", tmp_path / "empty", "--save-labels", "voc")
    assert "would be the same: rename one" in sentence


def test_labels_that_exist_are_kept(
    predict: Predict, weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict("--input", images, "--threshold", 0, "--save-labels", "voc")
    corrected = tmp_path / "out/labels_voc/a.xml"
    corrected.write_text("corrected")
    words = ("--weights", weights, "--output", tmp_path / "out", "--input", images, "--save-labels", "voc")
    assert main(["predict", *map(str, words)]) == 1
    assert "labels_voc' exists and may contain corrected labels: rename it" in capsys.readouterr().err
    assert corrected.read_text() == "corrected"


def test_labels_copied_into_the_folder_of_the_images_are_a_data_set(
    predict: Predict, images: Path, tmp_path: Path
) -> None:
    rows = predict("--input", images, "--threshold", 0, "--save-labels", "voc")
    data = shutil.copytree(images, tmp_path / "data")
    shutil.copytree(tmp_path / "out/labels_voc", data, dirs_exist_ok=True)
    assert sum(len(record["annotations"]) for record in read_all(data, "voc")) == len(rows) > 30
