"""Videos with the detections of their frames: times, rotation, quality."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from relvit_d2.detection.model import build_detector
from relvit_d2.detection.predictor import Detector
from relvit_d2.report.prediction_videos import annotate_video, timed, upright
from relvit_d2.tasks import load_config
from relvit_d2.utils.randomness import seed_everything
from tests.support.videos import times, video


@pytest.fixture(scope="module")
def detector() -> Detector:
    """An untrained detector that returns detections of any score."""
    seed_everything(0, "model")
    keys = "MODEL.DEVICE cpu MODEL.ROI_HEADS.NUM_CLASSES 2 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0"
    cfg = load_config("configs/custom.yaml", keys.split())
    return Detector(cfg, build_detector(cfg), ["a", "b"], 0.0)


@pytest.fixture(scope="module")
def blind(detector: Detector) -> Detector:
    """A detector whose pictures have no boxes."""
    return Detector(detector.cfg, detector.model, detector.class_names, 1.0)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_of_a_variable_rate_keep_their_times(detector: Detector, tmp_path: Path, suffix: str) -> None:
    steps = [2001, 180_000, 2009, 60, 300_022, 2000]
    made = video(tmp_path / f"clip.{suffix}", [np.full((32, 32, 3), 50, np.uint8)] * 6, steps)
    rows, fault = annotate_video(made, tmp_path / "out.mp4", detector, 4)
    expected = times(made)
    assert expected[-1] > 8 and not fault
    assert times(tmp_path / "out.mp4") == pytest.approx(expected, abs=2e-5)
    found = {row["image_id"]: row["time"] for row in rows}
    assert found == {f"{made}#{i}": pytest.approx(time, abs=1e-5) for i, time in enumerate(expected)}


@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001), Fraction(19001317, 633380), Fraction(1, 3600), 240])
def test_frames_of_a_constant_rate_keep_their_times(detector: Detector, tmp_path: Path, rate: Fraction) -> None:
    frames = [np.full((32, 32, 3), 50, np.uint8)] * 5
    made = video(tmp_path / "clip.mkv", frames, [round(60000 / rate)] * 5)
    annotate_video(made, tmp_path / "out.mp4", detector, 2)
    assert times(tmp_path / "out.mp4") == pytest.approx(times(made), abs=2e-5)


def test_times_start_at_0_and_increase() -> None:
    def frame(stamp: int | None) -> av.VideoFrame:
        made = av.VideoFrame(16, 16, "rgb24")
        made.pts, made.time_base = stamp, Fraction(1, 10)
        return made

    def of(*stamps: int | None) -> list[float]:
        return [float(time) for _, time, _ in timed(map(frame, stamps), Fraction(1, 4))]

    assert of(30, 31, 35) == [0, 0.1, 0.5]
    assert of(None, None, None) == [0, 0.25, 0.5]
    assert of(7, None, 13) == [0, 0.25, 0.6]
    assert of(5, 5, 9) == pytest.approx([0, 0, 0.4], abs=1e-3) and of(5, 5, 9)[1] > 0
    assert of(50, 52, 10, 13) == pytest.approx([0, 0.2, 0.45, 0.75])  # time stamps that start again
    assert of(0, 1, 10**9, 10**9 + 5) == pytest.approx([0, 0.1, 0.35, 0.85])
    assert of(0, 1, 30_000) == [0, 0.1, 3000]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
def test_videos_are_rotated_upright(blind: Detector, tmp_path: Path, degrees: int, flips: tuple[bool, bool]) -> None:
    coded = np.zeros((64, 96, 3), np.uint8)
    coded[:32, :48], coded[32:, 48:], coded[:32, 48:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    made = video(tmp_path / "clip.mp4", [coded] * 2, turn=(degrees, *flips))
    # Counter-clockwise, then mirrored, as PyAV documents set_display_rotation.
    expected = np.rot90(coded, degrees // 90)
    expected = expected[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
    with av.open(str(made)) as source:
        for frame in source.decode(video=0):
            shown = upright(frame)
            assert shown.shape == expected.shape and np.abs(shown.astype(int) - expected).mean() < 12
    annotate_video(made, tmp_path / "out.mp4", blind, 4)
    with av.open(str(tmp_path / "out.mp4")) as written:
        for frame in written.decode(video=0):
            shown = np.array(frame.to_image().resize(expected.shape[1::-1])).astype(int)
            assert "DISPLAYMATRIX" not in frame.side_data and np.abs(shown - expected).mean() < 12


def test_written_videos_have_a_high_psnr(blind: Detector, samples: Path, tmp_path: Path) -> None:
    with Image.open(min((samples / "VOC2007/JPEGImages").glob("*.jpg"))) as photo:
        pixels = np.array(photo.convert("RGB").resize((800, 600)))
    made = video(tmp_path / "clip.mp4", [np.roll(pixels, 8 * i, axis=1) for i in range(6)], rate=30, bits=8_000_000)
    annotate_video(made, tmp_path / "out.mp4", blind, 2)
    with av.open(str(made)) as source, av.open(str(tmp_path / "out.mp4")) as written:
        pairs = zip(source.decode(video=0), written.decode(video=0), strict=True)
        apart = [np.subtract(*(f.to_ndarray(format="gray").astype(int) for f in pair)) for pair in pairs]
    assert max(float((error**2).mean()) for error in apart) < 60  # a PSNR above 30 dB
