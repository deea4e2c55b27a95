"""The choice of images to label: against a slow version, and the commands embed and select."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from relvit_d2 import load_encoder
from relvit_d2.analysis.embedding import PART, read_features
from relvit_d2.analysis.selection import CANDIDATES, k_centre
from relvit_d2.conversion.encoder_file import save_encoder
from relvit_d2.encoders import build_encoder
from tests.support.scripts import fails, run, started, wait_for

FEATURES = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("labelled", [[], [3], [7, 50, 12]])
def test_each_image_is_the_farthest_from_the_labelled_and_earlier_ones(labelled: list[int]) -> None:
    chosen = k_centre(FEATURES, 20, labelled)
    taken = list(labelled)
    for one in chosen:
        if taken:
            nearest = {i: min(distance(FEATURES[i], FEATURES[j]) for j in taken) for i in range(60) if i not in taken}
            assert one.distance == pytest.approx(max(nearest.values()), abs=1e-5)
            assert nearest[one.image] == pytest.approx(one.distance, abs=1e-5)
            assert one.nearest in taken
            assert distance(FEATURES[one.image], FEATURES[one.nearest]) == pytest.approx(one.distance, abs=1e-5)
        taken.append(one.image)
    assert len(set(taken)) == len(labelled) + 20
    assert len(k_centre(FEATURES, 100, labelled)) == 60 - len(labelled)


def test_the_order_and_the_scale_of_the_images_do_not_matter() -> None:
    order = np.random.default_rng(1).permutation(60)
    scaled = FEATURES[order] * np.random.default_rng(2).uniform(0.5, 2, (60, 1)).astype(np.float32)
    labelled = [4, 5]
    found = k_centre(scaled, 10, [int(np.flatnonzero(order == one)[0]) for one in labelled])
    assert [int(order[one.image]) for one in found] == [one.image for one in k_centre(FEATURES, 10, labelled)]


def test_of_nearly_equal_images_one_is_chosen_and_none_if_one_is_labelled() -> None:
    groups = [[0, 1, 2, 3], [10, 11], [20, 21, 22]]
    chosen = {one.image for one in k_centre(FEATURES, 60, [11], groups)}
    assert not chosen & {10, 11}
    assert len(chosen & {0, 1, 2, 3}) == len(chosen & {20, 21, 22}) == 1
    assert len(chosen) == 60 - 2 - 3 - 2


def test_only_the_most_uncertain_images_are_candidates() -> None:
    doubt = np.arange(60) / 60
    chosen = [one.image for one in k_centre(FEATURES, 4, [59], uncertainty=doubt)]
    assert len(chosen) == 4 and min(chosen) >= 59 - 4 * CANDIDATES


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    statistics = {"pixel_mean": [120.0, 110.0, 100.0], "pixel_std": [60.0, 50.0, 40.0], "image_size": 16}
    save_encoder(build_encoder("vit_nano", patch_size=8, img_size=16), tmp_path / "encoder.safetensors", statistics)
    return tmp_path / "encoder.safetensors"


def draw(folder: Path, count: int) -> list[Path]:
    """Write images of noise, two of different shapes in turn."""
    folder.mkdir()
    random = np.random.default_rng(0)
    files = [folder / f"{number:03}.png" for number in range(count)]
    for number, file in enumerate(files):
        shape = ((16, 16, 3), (8, 20, 3))[number % 2]
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(file)
    return files


def test_embed_writes_the_features_of_each_image_and_select_reads_them(weights: Path, tmp_path: Path) -> None:
    files = draw(tmp_path / "images", 9)
    (tmp_path / "images/damaged.png").write_bytes(b"no image")
    words = "relvit-d2", "embed", "--weights", weights, "--input", tmp_path / "images", "--batch", 4
    error = fails(tmp_path, *words, "--output", tmp_path / "all.parquet")
    assert "1 of 10 images could not be read" in error and "damaged.png" in error
    found = read_features(tmp_path / "all.parquet")
    assert found.paths == list(map(str, files))
    encoder = load_encoder(weights)
    for file, features in zip(files, found.features, strict=True):
        np.testing.assert_allclose(features, encoder(file).pooled, atol=1e-5)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/damaged.png").write_bytes(b"no image")
    error = fails(tmp_path, *words[:5], tmp_path / "none", "--output", tmp_path / "none.parquet")
    assert "none of the 1 images could be read" in error and not (tmp_path / "none.parquet").exists()
    (tmp_path / "labelled.txt").write_text(f"{files[0]}\n{files[4]}\n")
    choose = "relvit-d2", "select", "--features", tmp_path / "all.parquet", "--labelled", tmp_path / "labelled.txt"
    run(tmp_path, *choose, "--count", 3, "--output", tmp_path / "selection")
    expected = [files[one.image] for one in k_centre(found.features, 3, [0, 4])]
    assert (tmp_path / "selection/selected.txt").read_text().split() == list(map(str, expected))
    entries = json.loads((tmp_path / "selection/selected.json").read_text())
    assert all(entry["nearest"] in entry["reason"] for entry in entries)
    with Image.open(tmp_path / "selection/selected.png") as sheet:
        assert sheet.width > 300


def test_an_interrupted_embed_continues_with_its_finished_parts(weights: Path, tmp_path: Path) -> None:
    draw(tmp_path / "images", PART + 8)
    output = tmp_path / "all.parquet"
    words = "relvit-d2", "embed", "--weights", weights, "--input", tmp_path / "images", "--output", output, "--batch", 8
    parts = tmp_path / ".all.parquet.parts"
    with started(tmp_path, *words) as process:
        wait_for(lambda: bool(list(parts.glob("*.parquet"))), process)
        process.kill()
    assert not output.exists()
    (part,) = parts.glob("*.parquet")
    table = parquet.read_table(part)
    parquet.write_table(table.set_column(0, "path", [["marked"] * PART]), part)
    run(tmp_path, *words)
    assert read_features(output).paths.count("marked") == PART and not parts.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("select", "--features", "absent.parquet", "--count", 1), "'absent.parquet' is not a file of relvit-d2 embed"),
        (("select", "--features", "absent.parquet", "--count", 0), "--count 0: give at least 1"),
        (("embed", "--weights", "absent", "--input", "absent"), "absent"),
        (
            ("embed", "--weights", "absent", "--input", "images", "--output", "a.csv"),
            "'a.csv' does not end in .parquet",
        ),
    ],
)
def test_invalid_input_is_one_sentence(words: tuple[object, ...], message: str, tmp_path: Path) -> None:
    assert message in fails(tmp_path, "relvit-d2", *words)
