"""Semi-supervised runs as scripts: resumption, invalid input, and the recipe."""

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.custom_data import picture, yolo_folder
from tests.support.runs import equal, rows
from tests.support.scripts import command, fails, run

# Iterations 0 and 1 have labelled images only; the detector is hardly trained, so that its scores are low.
KEYS = (
    *("SOLVER.MAX_ITER", 6, "SEMI.BURN_IN", 2, "SOLVER.GRAD_ACCUM_STEPS", 2),
    *("SEMI.THRESHOLD", 0.01, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001),
)


@pytest.fixture(scope="module")
def photos(root: Path) -> Path:
    """Seven images without labels, one of them damaged; the data root has street numbers as labelled images."""
    for number in range(6):
        picture(root / f"photos/{number}.png", number)
    (root / "photos/damaged.png").write_bytes(b"no image")
    return root / "photos"


def semi(output: Path, photos: Path, *more: object, flags: tuple[object, ...] = ()) -> tuple[object, ...]:
    return command("train_net.py", output, *KEYS, *more, flags=("--unlabelled", photos, *flags))


@pytest.mark.parametrize(
    ("flags", "kills"),
    [
        ((), ("step:4",)),
        pytest.param((), ("step:2", "checkpoint:2"), marks=pytest.mark.slow),
        pytest.param(("--num-gpus", 2), ("step:5:1",), marks=pytest.mark.slow),
    ],
)
def test_a_killed_and_resumed_run_is_bitwise_identical(
    flags: tuple[object, ...], kills: tuple[str, ...], root: Path, photos: Path, tmp_path: Path
) -> None:
    """Killed before, in and after the first iterations with unlabelled images, and resumed with loader processes."""
    whole, parts, keys = tmp_path / "whole", tmp_path / "parts", ("DATASETS.TEST", "()")
    printed = run(root, *semi(whole, photos, *keys, flags=flags)).stdout
    assert "1 of 7 images cannot be read and are left out" in printed
    assert "moving average of the weights with decay 0.999 (SOLVER.EMA)" in printed
    for kill in kills:
        status = -signal.SIGKILL if not flags else 1
        run(root, *semi(parts, photos, *keys, flags=(*flags, "--resume")), status=status, fault=kill)
    run(root, *semi(parts, photos, *keys, "DATALOADER.NUM_WORKERS", 1, flags=(*flags, "--resume")))
    first, second = (torch.load(output / "model_final.pth", weights_only=True) for output in (whole, parts))
    for key in ("model", "optimizer", "ema", "iteration"):
        assert equal(first[key], second[key]), key
    assert rows(whole) == rows(parts)
    with_labels = [row["iteration"] for row in rows(whole) if "count_pseudo_labels" in row]
    assert with_labels == [2, 3, 4, 5]
    assert all(row["count_pseudo_labels"] > 0 for row in rows(whole)[2:])


def test_images_that_were_added_are_detected_on_resumption(root: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    run(root, *semi(tmp_path / "run", folder), status=-signal.SIGKILL, fault="step:3")
    picture(folder / "new.png", 70)
    sentence = fails(root, *semi(tmp_path / "run", folder, flags=("--resume",)))
    assert re.search(r"the training data of the run .* have changed: '\S+new.png' was added", sentence)


def test_test_images_are_left_out_or_refused(root: Path, photos: Path, tmp_path: Path) -> None:
    """Also as a smaller copy in another format."""
    folder = tmp_path / "photos"
    folder.mkdir()
    tests = sorted((root / "svhn/test").glob("*.png"))
    for number, file in enumerate(tests[:3]):
        Image.open(file).save(folder / f"{number}.bmp")
    sentence = fails(root, *semi(tmp_path / "run", folder))
    assert f"every image of {folder} is a duplicate or near-duplicate of one of svhn_test" in sentence
    assert "set another SEMI.UNLABELLED" in sentence
    assert not (tmp_path / "run/metrics.json").exists()
    for number in range(2):
        picture(folder / f"new_{number}.png", number)
    printed = run(root, *semi(tmp_path / "run", folder, "SOLVER.MAX_ITER", 4)).stdout
    assert f"3 of 5 images of {folder} are left out: duplicates or near-duplicates of images of svhn_test" in printed
    listed = (tmp_path / "run/training_data.jsonl").read_text()
    assert "new_1.png" in listed and ".bmp" not in listed


def test_invalid_input_is_one_sentence(root: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    shutil.copy(photos / "damaged.png", tmp_path / "damaged")
    for folder, keys, sentence in (
        (tmp_path / "nowhere", (), "the image folder .*nowhere does not exist: correct the path"),
        (tmp_path / "damaged", (), "none of the 1 images can be read"),
        (photos, ("SEMI.BURN_IN", 6), "SEMI.BURN_IN 6 leaves none of the 6 iterations for unlabelled images"),
    ):
        assert re.search(sentence, fails(root, *semi(tmp_path / "run", folder, *keys)))
        assert not (tmp_path / "run/metrics.json").exists()


@pytest.mark.slow
def test_the_recipe_includes_unlabelled_images(photos: Path, tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "cells", *(f"train/{number}" for number in range(6)), "val/6", "val/7")
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    shutil.copy(next(root.rglob("6.*g")), folder / "of_val.png")
    words = ("relvit-d2", "train", "--data", root, "--unlabelled", folder, "--hours", 0.05, "--pretrain")
    keys = ("MODEL.ENCODER.NAME", "vit_nano", "SOLVER.MAX_ITER", 6, "SEMI.THRESHOLD", 0.1)
    run(tmp_path, *words, *keys, "OUTPUT_DIR", tmp_path / "run")
    assert f"UNLABELLED: {folder}" in (tmp_path / "run/recipe.yaml").read_text()
    seen = (tmp_path / "run/pretraining/training_data.jsonl").read_text()
    assert "photos/4.png" in seen and "of_val.png" not in seen
    run(tmp_path, "train_net.py", "--config-file", tmp_path / "run/recipe.yaml", "OUTPUT_DIR", tmp_path / "again")
    first, again = (rows(tmp_path / name) for name in ("run/detector", "again"))
    assert first == again
    assert "count_pseudo_labels" in first[-1] and "count_pseudo_labels" not in first[0]
    wrong = ("relvit-d2", "train", "--data", root, "--unlabelled", tmp_path / "nowhere", "OUTPUT_DIR", tmp_path / "no")
    assert "nowhere does not exist" in fails(tmp_path, *wrong)
