"""Training, evaluation and prediction on custom data sets through the command line."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from relvit_d2.analysis.anchors import fit_report
from relvit_d2.tasks import load_config
from tests.support.custom_data import write_yolo, yolo_folder
from tests.support.scripts import fails, run

TINY = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 1)


def test_train_evaluate_predict_and_pretrain(tmp_path: Path) -> None:
    """With masks, and with images without objects."""
    root = write_yolo(tmp_path / "cells")
    (root / "labels/train/a.txt").write_text("0 0.1 0.1 0.9 0.1 0.1 0.9\n1 0.3 0.3 0.6 0.3 0.3 0.6\n")
    (root / "labels/val/c.txt").write_text("0 0.1 0.1 0.9 0.1 0.1 0.9\n")
    flags = ("--config-file", "configs/demo/streets.yaml")
    masks = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    empty = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
    output = tmp_path / "my 1'st run"
    done = run(tmp_path, "train_net.py", *flags, "--data", root, *TINY, *masks, *empty, "OUTPUT_DIR", output)
    (following,) = re.findall("^next +(relvit-d2 .+)", done.stdout, re.MULTILINE)
    words = [str(root / "images") if word == "IMAGES" else word for word in shlex.split(following)]
    run(tmp_path, *words, "--output", tmp_path / "found")
    assert (tmp_path / "found/detections.json").is_file()
    assert "classes cat, dog" in done.stdout
    assert "2 training images" in done.stdout
    assert "loss_mask" in done.stdout
    results = json.loads((output / "inference/results.json").read_text())
    assert {"bbox", "segm"} <= set(results["cells_val"])
    run(tmp_path, "train_net.py", "--config-file", output / "config.yaml", "--eval-only", "--resume")
    assert json.loads((output / "inference/results.json").read_text()) == results
    small = (*TINY, "PRETEXT.IMAGE_SIZE", 32, "OUTPUT_DIR", tmp_path / "ssl")
    config = ("--config-file", "configs/demo/ssl_streets.yaml")
    assert "2 training images" in run(tmp_path, "pretrain_ssl.py", *config, "--data", root, *small).stdout


@pytest.mark.slow
def test_locale_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written in UTF-8, and the terminal shows escapes for characters that it cannot print."""
    root = write_yolo(tmp_path / "cells")
    (root / "data.yaml").write_text("names: [Käfer, 猫]\n", encoding="utf-8")
    config = tmp_path / "config.yaml"
    base = Path("configs/demo/streets.yaml").resolve()
    config.write_text(f"# Größe\n_BASE_: {base}\nOUTPUT_DIR: {tmp_path / 'out'}\n", encoding="utf-8")
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    done = run(tmp_path, "train_net.py", "--config-file", config, "--data", root, *TINY, fresh=True)
    assert "classes K\\xe4fer, \\u732b" in done.stdout
    assert "the report could not be written" not in done.stdout
    for name in ("report.html", "log.txt"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Käfer" in text and "猫" in text, name
    done = run(tmp_path, "relvit-d2", "check-data", root, "--output", tmp_path / "check", fresh=True)
    assert "K\\xe4fer" in done.stdout
    weights = ("--weights", tmp_path / "out", "--input", root / "images")
    run(tmp_path, "relvit-d2", "predict", *weights, "--output", tmp_path / "found", fresh=True)
    output = ("OUTPUT_DIR", tmp_path / "größe")
    sentence = fails(tmp_path, "train_net.py", "--config-file", config, "--data", root, *output, fresh=True)
    assert "is not valid in the encoding of this locale, ascii: set the environment variable PYTHONUTF8=1" in sentence
    config.write_text(f"_BASE_: {base}\nOUTPUT_DIR: {tmp_path / 'größe'}\n", encoding="utf-8")
    sentence = fails(tmp_path, "train_net.py", "--config-file", config, "--data", root, *TINY, fresh=True)
    assert "OUTPUT_DIR" in sentence and "PYTHONUTF8=1" in sentence


def test_partial_masks_and_sets_without_objects(tmp_path: Path) -> None:
    """Only box AP if an object lacks a mask, decided before training; evaluation of sets without objects or images."""
    root = write_yolo(tmp_path / "cells")
    triangle = "0 0.1 0.1 0.9 0.1 0.1 0.9\n"
    (root / "labels/train/a.txt").write_text(triangle)
    (root / "labels/val/c.txt").write_text(triangle + "1 0.5 0.5 0.5 0.5\n")
    flags = ("--config-file", "configs/demo/streets.yaml")
    masks = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    output = tmp_path / "out"
    done = run(tmp_path, "train_net.py", *flags, "--data", root, *TINY, *masks, "OUTPUT_DIR", output)
    sentence = "only box AP is computed on cells_val (objects without a mask: 1)"
    assert done.stdout.count(sentence) == 1 and "loss_mask" in done.stdout.partition(sentence)[2]
    results = json.loads((output / "inference/results.json").read_text())["cells_val"]
    assert results.keys() == {"bbox"} and results["bbox"]["AP"] is not None
    assert "result   bbox (at most 20 detections an image) AP" in done.stdout
    (root / "labels/val/c.txt").write_text("")
    again = ("train_net.py", "--config-file", output / "config.yaml", "--eval-only", "--resume")
    assert "cells_val: the images have no objects" not in run(tmp_path, *again).stdout
    assert json.loads((output / "inference/results.json").read_text())["cells_val"]["bbox"]["AP"] is None
    shutil.rmtree(root / "images/val")
    (root / "data.yaml").write_text("names: [Person, Cat]\n")
    (root / "images/train/b.png").unlink()  # a single image: nothing is held out
    done = run(tmp_path, "train_net.py", *flags, "--data", root, *TINY, "OUTPUT_DIR", tmp_path / "one")
    assert "cells_val: there are no images, so AP on this set is NaN" in done.stdout
    assert "AP: no objects on cells_val" in done.stdout


def test_other_commands_take_a_folder(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "cells", "train/a", "train/b", "val/c")
    (root / "classes.txt").write_text("RBC\n")
    config = ("--config-file", "configs/demo/streets.yaml")
    small = ("INPUT.MIN_SIZE_TRAIN", "(96,)")
    done = run(tmp_path, "relvit-d2", "check-data", *config, "--data", root, *small, "--output", tmp_path / "check")
    lines = done.stdout.splitlines()
    start = lines.index("proposed anchors:")
    cfg = load_config(config[1], [*map(str, small), *shlex.split(" ".join(lines[start + 1 : start + 3]))])
    report = json.loads((tmp_path / "check/check.json").read_text())
    proposal = report["anchors"]["proposal"]
    assert report["sets"].keys() == {"cells_train", "cells_val"}
    assert proposal["SIZES"] == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert proposal["ASPECT_RATIOS"] == cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS
    boxes = np.tile([[12.0, 9.0, 28.0, 21.0]], (2, 1))  # 0.4 of 40 x 30 pixels
    fit = fit_report(boxes, np.tile([[40.0, 30.0]], (2, 1)), cfg)["anchors"]  # at the training size of the config
    assert fit["best_iou"] == pytest.approx(proposal["best_iou"])
    table = run(tmp_path, "relvit-d2", "doctor", "--data", root).stdout
    assert re.search(r"^  train +2 images$", table, re.M) and re.search(r"^  val +1 images$", table, re.M)
    assert "assum" not in run(tmp_path, "relvit-d2", "analyze", *config, "--data", root).stdout
    assert "does not exist" in fails(tmp_path, "relvit-d2", "overfit-check", *config, "--data", tmp_path / "no")
