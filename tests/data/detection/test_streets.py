"""The data set streets: determinism, tight boxes, legibility, and atomic creation."""

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from relvit_d2.data.detection import streets
from relvit_d2.data.detection.streets import FONTS, SIDE, SPLITS, draw_image, ensure_streets, generate
from relvit_d2.data.detection.svhn import load_svhn
from relvit_d2.utils.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streets") / "drawn"
    generate(folder, 150, seed=5)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streets, "SPLITS", {"train": (1, 6), "test": (2, 3)})


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        generate(tmp_path / name, 8, seed=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_images_do_not_depend_on_count_and_order(tmp_path: Path, drawn: Path) -> None:
    generate(tmp_path / "few", 4, seed=5)
    few, many = load_svhn(tmp_path / "few"), load_svhn(drawn)
    for a, b in zip(few, many, strict=False):
        assert Path(a["file_name"]).read_bytes() == Path(b["file_name"]).read_bytes()
        assert a["annotations"] == b["annotations"]
    image, _ = draw_image(5, 149)
    with Image.open(drawn / "150.png") as stored:
        assert np.array_equal(np.asarray(image), np.asarray(stored))


def test_all_images_are_different() -> None:
    seeds = [seed for seed, _ in SPLITS.values()]
    images = [draw_image(seed, index)[0].tobytes() for seed in seeds for index in range(50)]
    assert len(set(images)) == len(images)
    assert SPLITS["test"][1] >= 200


def test_svhn_reader_returns_the_drawn_labels(drawn: Path) -> None:
    records = load_svhn(drawn)
    assert [record["image_id"] for record in records] == [str(index) for index in range(1, 151)]
    for index, record in enumerate(records):
        _, number = draw_image(5, index)
        assert (record["width"], record["height"]) == (SIDE, SIDE)
        assert [annotation["category_id"] for annotation in record["annotations"]] == number.digits.tolist()
        corners = np.array([annotation["bbox"] for annotation in record["annotations"]])
        assert np.array_equal(corners[:, 2:] - corners[:, :2], number.boxes[:, 2:])
        assert np.array_equal(corners[:, :2], number.boxes[:, :2])


def test_variety(drawn: Path) -> None:
    records = load_svhn(drawn)
    assert set(Counter(len(record["annotations"]) for record in records)) == {1, 2, 3, 4, 5}
    annotations = [annotation for record in records for annotation in record["annotations"]]
    assert {annotation["category_id"] for annotation in annotations} == set(range(10))
    heights = np.array([annotation["bbox"][3] - annotation["bbox"][1] for annotation in annotations])
    assert heights.min() >= 10
    assert (heights < 13).mean() > 0.1
    assert (heights > 22).mean() > 0.1


def test_boxes_are_tight() -> None:
    edges = np.arange(SIDE + 1)
    for index in range(100):
        _, number = draw_image(8, index)
        for ink, (left, top, width, height) in zip(number.coverage, number.boxes, strict=True):
            # Coverage per column and row of whole pixels; the fraction of each inside the box.
            for profile, low, length in ((ink.sum(0), left, width), (ink.sum(1), top, height)):
                covered = np.clip(np.minimum(edges[1:], low + length) - np.maximum(edges[:-1], low), 0, 1)
                assert profile[covered == 0].sum() <= 0.01 * ink.sum()
                assert (profile[np.flatnonzero(covered)[[0, -1]]] > 0).all()


@cache
def templates(width: int, height: int) -> np.ndarray:
    """Upright digits of all fonts stretched to a size: (10, fonts, height * width), standardised."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    stack = []
    for digit in "0123456789":
        for name in FONTS:
            font = ImageFont.truetype(str(folder / f"{name}.ttf"), 64)
            canvas = Image.new("L", (100, 100))
            ImageDraw.Draw(canvas).text((20, 10), digit, font=font, fill=255)
            glyph = canvas.crop(canvas.getbbox()).resize((width, height), Image.Resampling.BOX)
            stack.append(standardised(np.asarray(glyph, float)))
    return np.array(stack).reshape(10, len(FONTS), -1)


def standardised(patch: np.ndarray) -> np.ndarray:
    return (patch - patch.mean()).ravel() / (np.linalg.norm(patch - patch.mean()) + 1e-9)


def test_template_matching_finds_the_labelled_digits(drawn: Path) -> None:
    """Template matching is independent of the drawing and requires correct labels, boxes and contrast."""
    right = total = 0
    for record in load_svhn(drawn):
        with Image.open(record["file_name"]) as image:
            luma = np.asarray(image.convert("L"), float)
        for annotation in record["annotations"]:
            left, top, right_edge, bottom = np.rint(annotation["bbox"]).astype(int)
            patch = standardised(luma[top:bottom, left:right_edge])
            # Digits may be lighter or darker than the background.
            scores = np.abs(templates(right_edge - left, bottom - top) @ patch).max(axis=1)
            right += int(scores.argmax() == annotation["category_id"])
            total += 1
    assert right / total > 0.9


def test_every_digit_has_contrast(drawn: Path) -> None:
    for index in range(150):
        _, number = draw_image(5, index)
        with Image.open(drawn / f"{index + 1}.png") as image:
            luma = np.asarray(image.convert("L"), float) / 255
        free = number.coverage.max(axis=0) == 0
        for ink, (left, top, width, height) in zip(number.coverage, number.boxes.astype(int), strict=True):
            around = np.zeros_like(free)
            around[top - 1 : top + height + 2, left - 1 : left + width + 2] = True
            # Blur reduces the contrast slightly.
            contrast = abs(luma[ink > 0.9].mean() - luma[around & free].mean())
            assert contrast > streets.MIN_CONTRAST - 0.05


def test_interrupted_drawing_leaves_no_files(tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", 5, seed=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_killed_process_does_not_affect_the_next(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from relvit_d2.data.detection.streets import generate;"
        "generate(Path(sys.argv[1]), 10**6, 1, lambda done: print(done, flush=True))"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "set")],
        stdout=subprocess.PIPE,
        cwd=root,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "set").exists()
    assert list(tmp_path.iterdir()) != []
    generate(tmp_path / "set", 3, seed=1)
    assert len(load_svhn(tmp_path / "set")) == 3


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    generate(tmp_path / "set", 3, seed=1)
    before = contents(tmp_path / "set")
    generate(tmp_path / "set", 4, seed=2)
    assert contents(tmp_path / "set") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_concurrent_processes_create_one_folder(tmp_path: Path, small: None) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: ensure_streets(tmp_path), range(4)))
    assert set(folders) == {tmp_path / "streets"}
    assert list(tmp_path.iterdir()) == [tmp_path / "streets"]
    assert [len(load_svhn(folders[0] / split)) for split in ("train", "test")] == [6, 3]


def test_drawn_again_only_after_a_version_change(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ensure_streets(tmp_path)
    before = folder.stat().st_ino
    assert ensure_streets(tmp_path).stat().st_ino == before
    (folder / "train" / "1.png").unlink()
    monkeypatch.setattr(streets, "VERSION", streets.VERSION + 1)
    ensure_streets(tmp_path)
    assert (folder / "train" / "1.png").is_file()
    assert list(tmp_path.iterdir()) == [tmp_path / "streets"]


@pytest.mark.parametrize("text", ["", "[]", '{"version": 0}'])
def test_set_without_a_valid_version_is_drawn_again(tmp_path: Path, small: None, text: str) -> None:
    (tmp_path / "streets").mkdir()
    (tmp_path / "streets" / "streets.json").write_text(text)
    assert len(load_svhn(ensure_streets(tmp_path) / "test")) == 3


def test_root_that_is_not_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
        ensure_streets(tmp_path / "file")


def test_progress_counts_every_image(tmp_path: Path) -> None:
    seen: list[int] = []
    note: Callable[[int], None] = seen.append
    generate(tmp_path / "set", 4, seed=1, progress=note)
    assert seen == [1, 2, 3, 4]
