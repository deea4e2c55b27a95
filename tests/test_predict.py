"""Predictions outside of evaluation: the same detections, from files, arrays and videos, on disk and in Python."""

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from detectron2.structures import BoxMode, Instances
from PIL import Image

from relvit_d2 import load_detector
from relvit_d2.cli import main
from relvit_d2.detection.predictor import Detector
from relvit_d2.report.prediction_videos import annotate_video, written_rate
from relvit_d2.utils.errors import UserError
from tests.scripts import command, run

Failing = Callable[..., str]


@pytest.fixture(scope="module")
def trained(root: Path) -> Iterator[Path]:
    """The folder of a detector that has learnt next to nothing, but finds something everywhere."""
    run(root, *command("train_net.py", root / "run", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        yield root / "run"


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    return load_detector(trained)


@pytest.fixture(scope="module")
def images(root: Path) -> list[Path]:
    return sorted((root / "svhn/test").glob("*.png"))


@pytest.fixture()
def failing(trained: Path, capsys: pytest.CaptureFixture[str]) -> Failing:
    """Run relvit-d2 predict in this process; it must fail with one sentence, which is returned."""

    def call(*words: object, weights: Path = trained) -> str:
        assert main(["predict", "--weights", *map(str, (weights, *words))]) == 1
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


def test_a_loaded_detector_finds_what_evaluation_found(trained: Path, detector: Detector, images: list[Path]) -> None:
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


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_paths_arrays_pictures_and_batches_give_the_same(detector: Detector, images: list[Path]) -> None:
    together = detector.batch(images)
    for path, expected in zip(images, together, strict=True):
        with Image.open(path) as picture:
            for image in (path, str(path), picture, np.array(picture.convert("RGB"))):
                same(detector(image), expected)
    for bad in (np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(UserError, match="is no image"):
            detector(bad)


def test_pictures_of_pillow_are_read_like_their_files(detector: Detector, images: list[Path], tmp_path: Path) -> None:
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


def test_the_checkpoint_itself_and_its_folder_are_the_same_detector(
    trained: Path, detector: Detector, images: list[Path]
) -> None:
    same(load_detector(trained / "model_final.pth")(images[0]), detector(images[0]))


def test_the_tool_draws_every_input_and_writes_coco_results(
    root: Path, trained: Path, detector: Detector, images: list[Path], tmp_path: Path
) -> None:
    # Names that meet: another folder's, another ending's.
    other = tmp_path / "other"
    other.mkdir()
    with Image.open(images[0]) as picture:
        picture.save(other / images[0].name)
        picture.convert("RGB").save(other / f"{images[0].stem}.bmp")
    made = video(tmp_path / "clip.mp4", [np.full((47, 61, 3), 40 * i, np.uint8) for i in range(5)])
    pattern = f"{images[0].parent}/*.png"
    words = ("--input", pattern, other, made, "--output", tmp_path / "out", "--threshold", 0, "--batch", 2)
    done = run(root, "relvit-d2", "predict", "--weights", trained, *words)
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


def test_a_video_of_variable_frame_rate_is_written_at_its_average(detector: Detector, tmp_path: Path) -> None:
    made = video(tmp_path / "clip.mp4", [np.full((32, 32, 3), 50, np.uint8)] * 5, [2001, 2009, 2015, 2022, 2029])
    with av.open(str(made)) as source:
        rate = source.streams.video[0].average_rate
    assert rate and rate.numerator > 65535
    annotate_video(made, tmp_path / "out.mp4", detector, 0.5, 4)
    with av.open(str(tmp_path / "out.mp4")) as written:
        assert float(written.streams.video[0].average_rate or 0) == pytest.approx(float(rate), rel=1e-4)
        assert len(list(written.decode(video=0))) == 5


def test_a_frame_rate_that_the_codec_takes_stays() -> None:
    assert written_rate(Fraction(30000, 1001)) == Fraction(30000, 1001) and written_rate(None) == 25
    for rate in (Fraction(2997000, 100121), Fraction(19001317, 633380), Fraction(1, 3600)):
        found = written_rate(rate)
        assert found.numerator <= 65535 and float(found) == pytest.approx(float(rate), rel=1e-4)
    assert written_rate(Fraction(90000)) == 65535


def test_videos_are_refused_by_a_detector_of_other_channels(
    detector: Detector, failing: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = video(tmp_path / "clip.mp4", [np.full((32, 32, 3), 50, np.uint8)])
    monkeypatch.setattr(detector, "channels", 1)
    monkeypatch.setattr("relvit_d2.report.prediction_files.load_detector", lambda *_: detector)
    assert "clip.mp4' is a video, but INPUT.CHANNELS is 1" in failing("--input", made, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_threshold_leaves_out_what_scores_less(
    trained: Path, detector: Detector, images: list[Path], tmp_path: Path
) -> None:
    scores = detector(images[0]).scores
    middle = float(scores.median())
    words = ["--input", images[0], "--output", tmp_path, "--threshold", middle]
    assert main(["predict", "--weights", *map(str, (trained, *words))]) == 0
    results = json.loads((tmp_path / "detections.json").read_text())
    assert 0 < len(results) == int((scores >= middle).sum()) < len(scores)


def test_what_cannot_be_read_is_named_and_the_rest_is_done(
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


def test_bad_input_is_one_sentence(failing: Failing, images: list[Path], tmp_path: Path) -> None:
    output = ("--output", tmp_path / "out")
    assert "absent" in failing("--input", images[0], *output, weights=tmp_path / "absent/model_final.pth")
    assert "holds no checkpoint" in failing(
        "--input", images[0], *output, "--config-file", "configs/demo/streets.yaml", weights=tmp_path
    )
    pretrained = ("--config-file", "configs/ssl/voc_vit_s.yaml")
    assert "give a config or a run of train_net.py" in failing("--input", images[0], *output, *pretrained)
    assert "absent.png" in failing("--input", tmp_path / "absent.png", *output)
    assert "--threshold 2" in failing("--input", images[0], *output, "--threshold", 2)
    assert "--batch 0" in failing("--input", images[0], *output, "--batch", 0)
    cut = tmp_path / "cut.png"
    cut.write_bytes(images[0].read_bytes()[:200])
    assert "cut.png" in failing("--input", cut, *output)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"no video at all" * 20)
    assert "clip.mp4" in failing("--input", clip, *output)
    assert not [*tmp_path.glob("out/*")]
    assert "cut.png' cannot be made" in failing("--input", images[0], "--output", cut)


def video(path: Path, frames: list[np.ndarray], steps: list[int] | None = None) -> Path:
    """Write frames ``(H, W, 3)`` of uint8 as a video, 10 a second or ``steps`` / 60000 s apart."""
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if steps:
            stream.codec_context.time_base = Fraction(1, 60000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels[:height, :width].copy(), format="rgb24")
            if steps:
                frame.pts, frame.time_base = sum(steps[:index]), Fraction(1, 60000)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
    return path
