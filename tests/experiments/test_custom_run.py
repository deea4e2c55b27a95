"""relvit-d2 train on a folder: bad arguments, runs, recipes that run again."""

import re
from pathlib import Path

import pytest

from tests.support.custom_data import picture, write_yolo, yolo_folder
from tests.support.runs import rows
from tests.support.scripts import digests, fails, run, started, wait_for


def test_bad_arguments(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "cells")
    picture(tmp_path / "photos/a.png")
    one = yolo_folder(tmp_path / "one", "train/a", "val/b")
    (tmp_path / "begun/pretraining").mkdir(parents=True)
    begun = r"continue it with relvit-d2 pretrain --config-file \S+/pretraining.yaml --resume and then relvit-d2 train "
    config = ("--config-file", "configs/demo/streets.yaml")
    for words, sentence in (
        (("--data", root, "--hours", 0), "--hours 0: give a number above 0"),
        (("--data", root, "--hours", "nan"), "--hours nan: give a number above 0"),
        (("--data", root, "--hours", 0.001), "--hours 0.001 is too short to measure and train: give 0.05 or more"),
        ((*config, "--hours", 1), "need --data and no --config-file"),
        (("--data", root, "OUTPUT_DIR", tmp_path / "begun"), begun),
        *(
            (("--data", root, *words), f"{words[0]} needs a config: give --config-file with the recipe.yaml")
            for words in (
                ("--resume",),
                ("--machine-rank", 1),
            )
        ),
        (("--data", root, "--weights", "timm:vit_nonexist"), "timm .* has no model 'vit_nonexist'"),
        (
            ("--data", one, "OUTPUT_DIR", tmp_path / "one"),
            "one_train has one image with objects, from which no detector",
        ),
        (("--data", tmp_path / "photos"), "relvit-d2 pretrain --data takes images without labels"),
        (("--data", tmp_path / "nothing", "--dry-run"), "the data folder '.*nothing' does not exist"),
        (("--data", root / "data.yaml", "--dry-run"), "the data folder '.*data.yaml' is a file, not a folder"),
        ((root,), "cells' is not a config key: give it as --data "),
        ((), "for example: relvit-d2 train --data path/to/folder --hours 0.5 or relvit-d2 train --config-file"),
        (("--data", root, "--weights", tmp_path / "no.pth"), "--weights '.*no.pth' does not exist"),
    ):
        assert re.search(sentence, fails(tmp_path, "relvit-d2", "train", *words))


@pytest.mark.slow
def test_a_folder_becomes_a_detector(tmp_path: Path) -> None:
    names = [*(f"train/{number}" for number in range(6)), "val/6", "val/7"]
    root = yolo_folder(tmp_path / "it's C:\\new" / "cells", *names)
    output = ("OUTPUT_DIR", tmp_path / "run")
    words = ("relvit-d2", "train", "--data", root, "--hours", 0.1, "--pretrain", *output, "SOLVER.MAX_ITER", 30)
    done = run(tmp_path, *words, "MODEL.ENCODER.NAME", "vit_nano")
    assert "reason" in done.stdout and "best model: bbox/AP" in done.stdout
    assert re.search("next: relvit-d2 predict --weights .*/run/detector/model_best.pth --input IMAGES", done.stdout)
    for name in ("recipe.yaml", "pretraining.yaml", "detector/report.html", "pretraining/encoder.safetensors"):
        assert (tmp_path / "run" / name).is_file(), name
    assert list((tmp_path / "run/predictions").glob("*.png"))
    assert "holds a run: continue it with" in fails(tmp_path, *words)
    assert not (tmp_path / "run/trial").exists()
    run(tmp_path, "train_net.py", "--config-file", tmp_path / "run/recipe.yaml", "OUTPUT_DIR", tmp_path / "again")
    first, again = ((tmp_path / name / "inference/results.json").read_text() for name in ("run/detector", "again"))
    assert first == again


@pytest.mark.slow
def test_the_recipe_names_why_it_does_not_pretrain(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "cells", *(f"train/{number}" for number in range(6)), "val/6")
    words = ("relvit-d2", "train", "--data", root, "--hours", 0.03, "--dry-run", "OUTPUT_DIR", tmp_path / "run")
    keys = ("MODEL.ENCODER.NAME", "vit_nano", "SOLVER.MAX_ITER", 2)
    printed = run(tmp_path, *words, *keys).stdout
    assert re.search(
        r"pre-training +none +30% of the time is enough for about \d+ iterations, fewer than the 500", printed
    )
    assert not (tmp_path / "run/pretraining.yaml").exists()
    assert not re.search("^pre-training", run(tmp_path, *words, "--no-pretrain", *keys).stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_disk_that_fills_during_the_measurement_is_reported_with_the_folder_of_the_run(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "cells", *(f"train/{number}" for number in range(6)), "val/6")
    words = ("relvit-d2", "train", "--data", root, "--hours", 0.05, "--no-pretrain", "OUTPUT_DIR", tmp_path / "run")
    sentence = fails(tmp_path, *words, "MODEL.ENCODER.NAME", "vit_nano", fault="full:1000000")
    assert "free disk space" in sentence and f"{tmp_path}/run/detector/model_" in sentence
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_the_runs_of_a_folder_are_replaced_on_request(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "cells", *(f"train/{number}" for number in range(6)), "val/6")
    pretraining, detector = tmp_path / "run/pretraining", tmp_path / "run/detector"

    def words(iterations: int, *flags: str) -> tuple[object, ...]:
        keys = ("MODEL.ENCODER.NAME", "vit_nano", "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", tmp_path / "run")
        return ("relvit-d2", "train", "--data", root, "--hours", 0.05, "--pretrain", *flags, *keys)

    run(tmp_path, *words(2))
    first = {folder: digests(folder, "*.[ps]*") for folder in (pretraining, detector)}
    assert {"model_final.pth", "encoder.safetensors"} <= first[pretraining].keys()
    run(tmp_path, *words(3, "--overwrite", "--dry-run"))
    assert first == {folder: digests(folder, "*.[ps]*") for folder in (pretraining, detector)}

    # Neither the encoder nor the detector of the first run is taken for one of the second, which is killed.
    with started(tmp_path, *words(3, "--overwrite")) as process:
        wait_for((detector / "earlier_run").exists, process, 600)
    for folder, files in first.items():
        assert digests(folder / "earlier_run", "*.[ps]*") == files
        assert not (folder / "last_checkpoint").exists() and not (folder / "encoder.safetensors").exists()
    assert "pretraining.yaml --resume and then relvit-d2 train" in fails(tmp_path, *words(3))

    run(tmp_path, *words(3, "--overwrite"))
    assert len(rows(detector)) == 3 and (pretraining / "encoder.safetensors").exists()
    assert digests(detector / "earlier_run", "*.[ps]*") == first[detector]
