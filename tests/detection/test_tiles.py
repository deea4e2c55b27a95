"""Detection in tiles: every object once, whatever cuts it."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from relvit_d2.cli import main
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.data.images.strips import StripImage
from relvit_d2.detection.detections import Detections, Mask, TrainingSizes, mask_iou, mask_union
from relvit_d2.detection.tiles import MIN_TILE, Tiling, detect_in_tiles, scaled, starts
from relvit_d2.utils.errors import UserError
from tests.support.detectors import tiny_config, write_run


class ColorDetector:
    """Detects the areas of one colour, whose red value minus 1 is the class.

    Like a network, it misses objects that are a too small part of the image.
    """

    class_names = ["a", "b", "c"]
    pixels = PixelFormat()
    training: TrainingSizes | None = None

    def __init__(self, smallest: float) -> None:
        self.smallest = smallest  # side, as a fraction of the image's

    def read(self, image: object) -> np.ndarray:
        raise NotImplementedError

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        return [self._detect(image) for image in images]

    def _detect(self, image: np.ndarray) -> Detections:
        found = []
        for color in np.unique(image.reshape(-1, 3), axis=0):
            mask = Mask.of((image == color).all(2))
            (height, width), visible = mask.pixels.shape, mask.pixels.sum()
            if color[0] and min(height / image.shape[0], width / image.shape[1]) >= self.smallest:
                box = [mask.left, mask.top, mask.left + width, mask.top + height]
                found.append((visible / (1 + visible), box, color[0] - 1, mask))
        found.sort(key=lambda entry: -entry[0])
        scores, boxes, classes, masks = zip(*found, strict=True) if found else ((), (), (), ())
        return Detections(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(scores, np.float32),
            np.array(classes, np.int64),
            list(masks),
        )


def drawn(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of rectangles that do not touch, of very different sizes, and their boxes (N, 4)."""
    rng = np.random.default_rng(seed)
    image, boxes = np.zeros((height, width, 3), np.uint8), []
    for number in range(200):
        side = rng.choice([12, 20, 90, 150], 2)
        x, y = rng.integers(0, width - side[0]), rng.integers(0, height - side[1])
        if not image[max(y - 2, 0) : y + side[1] + 2, max(x - 2, 0) : x + side[0] + 2].any():
            image[y : y + side[1], x : x + side[0]] = (1 + number % 3, number, 255)
            boxes.append([x, y, x + side[0], y + side[1]])
    return image, np.array(boxes)


@pytest.mark.parametrize(("seed", "smallest", "batch"), [(0, 0.0, 1), (1, 0.12, 5), (2, 0.12, 1)])
def test_every_object_is_found_once_and_whole(seed: int, smallest: float, batch: int) -> None:
    height, width = 300 + 41 * seed, 400
    image, boxes = drawn(seed, height, width)
    detector = ColorDetector(smallest)
    (alone,) = detector.detect([image])
    assert smallest == 0 or len(alone.boxes) < len(boxes) > 10
    found = detect_in_tiles(detector, StripImage.of(image), Tiling(96, 64, 20), batch)
    assert (np.diff(found.scores) <= 0).all()
    assert sorted(map(tuple, found.boxes.tolist())) == sorted(map(tuple, boxes.tolist()))
    assert found.masks is not None
    for box, number, mask in zip(found.boxes.astype(int), found.classes, found.masks, strict=True):
        x0, y0, x1, y1 = box
        assert (image[y0, x0, 0] - 1 == number) and (mask.left, mask.top) == (x0, y0) and mask.pixels.all()
        assert mask.pixels.shape == (y1 - y0, x1 - x0)


def test_an_image_of_one_tile_is_detected_in_as_usual() -> None:
    image, _ = drawn(0, 300, 400)
    (alone,) = ColorDetector(0.1).detect([image])
    found = detect_in_tiles(ColorDetector(0.1), StripImage.of(image), Tiling(400, 300, 20), 2)
    np.testing.assert_array_equal(found.boxes, alone.boxes)


@given(length=st.integers(1, 5000), tile=st.integers(MIN_TILE, 900), share=st.floats(0, 0.8))
def test_tiles_cover_a_length_with_the_overlap_and_are_as_few_as_possible(length: int, tile: int, share: float) -> None:
    common = int(share * tile)
    first = starts(length, tile, common)
    assert first[0] == 0 and first[-1] == max(length - tile, 0)
    assert all(0 < b - a <= tile - common for a, b in pairwise(first))
    fewer = len(first) - 1
    assert fewer == 0 or fewer * tile - (fewer - 1) * common < length


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_masks_of_parts_equal_whole_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 30, 2).tolist()
    whole = [rng.random((height, width)) < share for share in rng.choice([0, 0.05, 0.5, 1], 2)]
    whole[1][: rng.integers(0, height + 1)] = False
    masks = [Mask.of(mask) for mask in whole]
    for mask, expected in zip(masks, whole, strict=True):
        np.testing.assert_array_equal(mask.whole(height, width), expected)
        encoded = coco_mask.encode(np.asfortranarray(expected, dtype=np.uint8))
        assert mask.rle(height, width) == {"size": [height, width], "counts": encoded["counts"].decode()}
    both = whole[0] | whole[1]
    np.testing.assert_array_equal(mask_union(*masks).whole(height, width), both)
    assert mask_iou(*masks) == pytest.approx((whole[0] & whole[1]).sum() / both.sum() if both.any() else 1)


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 3), st.floats(0.2, 3))
@settings(max_examples=30)
def test_scaled_masks_stay_at_their_place(seed: int, across: float, down: float) -> None:
    rng = np.random.default_rng(seed)
    whole = np.zeros((30, 40), bool)
    x0, y0 = rng.integers(0, 30), rng.integers(0, 20)
    whole[y0 : y0 + rng.integers(1, 11), x0 : x0 + rng.integers(1, 11)] = True
    size = round(40 * across), round(30 * down)
    found = Detections(np.zeros((1, 4), np.float32), np.ones(1, np.float32), np.zeros(1, np.int64), [Mask.of(whole)])
    masks = scaled(found, size[0] / 40, size[1] / 30).masks
    assert masks is not None
    rows = ((np.arange(size[1]) + 0.5) * 30 / size[1]).astype(int)
    columns = ((np.arange(size[0]) + 0.5) * 40 / size[0]).astype(int)
    expected = whole[np.ix_(rows, columns)]
    different = masks[0].whole(size[1], size[0]) != expected
    inner = expected[1:-1, 1:-1] & expected[:-2, 1:-1] & expected[2:, 1:-1] & expected[1:-1, :-2] & expected[1:-1, 2:]
    assert not (different[1:-1, 1:-1] & inner).any()  # at most a pixel at the edge differs


@pytest.mark.parametrize(
    ("text", "overlap", "training", "words"),
    [
        ("640x", 0.2, None, "are not auto"),
        ("-5", 0.2, None, "are not auto"),
        ("16", 0.2, None, f"at least {MIN_TILE}"),
        ("640", 0.9, None, "overlap"),
        ("640", float("nan"), None, "overlap"),
        ("auto", 0.2, None, "give their size"),
    ],
)
def test_tilings_that_are_not_possible(text: str, overlap: float, training: None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Tiling.of(text, overlap, training)


def test_automatic_tiles_are_like_training_images() -> None:
    assert Tiling.of("auto", 0.2, TrainingSizes(640, 480, 50)) == Tiling(640, 480, 96)
    assert Tiling.of("auto", 0.2, TrainingSizes(640, 480, 150)) == Tiling(640, 480, 150)
    assert Tiling.of("auto", 0.2, TrainingSizes(640, 480, 400)) == Tiling(640, 480, 240)
    assert Tiling.of("800x600", 0.5, None) == Tiling(800, 600, 300)


def test_predict_in_tiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", tiny_config("MODEL.MASK_ON", True))
    noise = np.random.default_rng(0).integers(0, 255, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    words = ["predict", "--weights", str(run), "--input", str(tmp_path / "large.png"), "--threshold", "0"]

    def detections(*more: str) -> list[dict[str, object]]:
        assert main([*words, "--output", str(tmp_path / "out"), *more]) == 0
        return json.loads((tmp_path / "out/detections.json").read_text())

    whole, tiled = detections(), detections("--tiles", "64", "--batch", "3")
    assert len(tiled) > len(whole) > 0 and detections("--tiles", "200x150") == whole
    assert all(row["segmentation"]["size"] == [150, 200] for row in tiled)  # type: ignore[index]
    capsys.readouterr()
    assert main([*words, "--tiles", "auto"]) == 1
    assert "give their size in pixels" in capsys.readouterr().err
