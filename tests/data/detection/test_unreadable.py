"""Images that cannot be read: a detector trains on the others and is evaluated on the others."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import register_custom
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import WRITERS, custom_keys, yolo_folder
from tests.support.runs import equal
from tests.support.scripts import fails, run

KEYS = "SOLVER.MAX_ITER 6 SOLVER.IMS_PER_BATCH 2 SOLVER.WARMUP_ITERS 1 SOLVER.CHECKPOINT_PERIOD 2 TEST.EVAL_PERIOD 2"
LOW = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 100)
CONFIG = ("--config-file", "configs/demo/streets.yaml")
EMPTY = ("train/b", "val/h")  # without a header
CUT = ("train/d", "val/j")  # with a header and a part of the pixels


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Images of which some cannot be read."""
    root = tmp_path / "cells"
    yolo_folder(root, *(f"train/{name}" for name in "abcdef"), *(f"val/{name}" for name in "ghij"))
    for name in EMPTY:
        (root / f"images/{name}.png").write_bytes(b"")
    for name in CUT:
        (root / f"images/{name}.png").write_bytes((root / f"images/{name}.png").read_bytes()[:400])
    return root


def test_a_detector_trains_and_is_evaluated_on_the_readable_images(cells: Path, tmp_path: Path) -> None:
    def train(output: Path, *more: object, status: int = 0, fault: str = "") -> str:
        words = ("train_net.py", *CONFIG, "--data", cells, *more, *KEYS.split(), *LOW, "OUTPUT_DIR", output)
        return run(tmp_path, *words, status=status, fault=fault).stdout

    out, killed = tmp_path / "out", tmp_path / "killed"
    log = train(out)
    before, training = log.split("5 training images", 1)
    assert f"1 of 6 images cannot be read and are left out: {cells}/images/train/b.png" in before
    assert f"1 of 4 images cannot be read and are left out: {cells}/images/val/h.png" in before
    assert "train/d.png' is damaged or truncated" in training
    assert f"1 training images could not be read and were replaced by the next ones: {cells}/images/train/d.png" in log
    left_out = "2 of 4 images of cells_val cannot be read and are left out of the results"
    assert f"{left_out}: {cells}/images/val/h.png, {cells}/images/val/j.png" in log
    assert "2 images of cells_val cannot be read and are left out" in (out / "report.html").read_text()
    results = json.loads((out / "inference/results.json").read_text())["cells_val"]
    assert results.pop("unreadable_images") == {"images": 2}

    train(killed, "DATALOADER.NUM_WORKERS", 1, status=-signal.SIGKILL, fault="step:4")
    train(killed, "--resume", "DATALOADER.NUM_WORKERS", 2)
    first, second = (torch.load(folder / "model_final.pth", weights_only=True)["model"] for folder in (out, killed))
    assert equal(first, second)

    # The results are those of a data set without these images.
    for name in (*EMPTY, *CUT):
        (cells / f"images/{name}.png").unlink()
    clean = ("--data", cells, "--eval-only", "MODEL.WEIGHTS", out / "model_final.pth")
    run(tmp_path, "train_net.py", *CONFIG, *clean, *LOW, "OUTPUT_DIR", tmp_path / "clean")
    assert json.loads((tmp_path / "clean/inference/results.json").read_text())["cells_val"] == results


def test_an_unreadable_image_is_an_error_on_request(cells: Path, tmp_path: Path) -> None:
    strict = ("DATASETS.SKIP_UNREADABLE", "False", "OUTPUT_DIR", tmp_path / "out", *KEYS.split())
    for broken in ("val/h", "train/b", "train/d"):
        sentence = fails(tmp_path, "train_net.py", *CONFIG, "--data", cells, *strict)
        assert f"{cells}/images/{broken}.png" in sentence
        shutil.copy(cells / "images/train/a.png", cells / f"images/{broken}.png")


@pytest.mark.parametrize("kind", WRITERS)
def test_only_the_unreadable_image_is_left_out_in_every_format(kind: str, tmp_path: Path) -> None:
    root = WRITERS[kind][1](tmp_path / "cells")
    keys = custom_keys(cells={"ROOT": str(root), "SPLIT": "train"})

    def read() -> list[dict[str, object]]:
        register_custom(keys)
        return catalog.get_records("cells")

    before = read()
    classes = catalog.get_metadata("cells").thing_classes
    (broken,) = [record["file_name"] for record in before if Path(str(record["file_name"])).stem == "a"]
    Path(str(broken)).write_bytes(b"no image")
    assert catalog.readable_records(read(), skip=True) == [r for r in before if r["file_name"] != broken]
    assert catalog.get_metadata("cells").thing_classes == classes
    with pytest.raises(UserError, match=r"a.png' is not an image that can be read"):
        catalog.readable_records(read(), skip=False)
