"""The scripts with a moving average of the weights, and in float16."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relvit_d2 import load_detector
from relvit_d2.conversion.encoder_file import read_encoder
from tests.support.runs import equal, rows
from tests.support.scripts import SCRIPTS, command, run

AVERAGE = ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5, "SOLVER.BASE_LR", 1e-2)
EVERY = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
DETECTIONS = "coco_instances_results.json"


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "inference/results.json").read_text())


def test_the_average_of_a_detector_is_evaluated_and_loaded_like_the_detector(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tmp_path / "run"
    run(root, *command("train_net.py", trained, *AVERAGE, *EVERY))
    found = results(trained)["svhn_test"]
    assert found["bbox"].keys() == found["bbox_ema"].keys()
    assert {"bbox/AP", "bbox_ema/AP"} <= rows(trained)[-1].keys()
    plain, average = ((trained / "inference" / folder / DETECTIONS).read_text() for folder in (".", "ema"))
    assert plain != average
    weights = trained / "model_final_ema.pth"
    again = command("train_net.py", tmp_path / "again", *EVERY, "MODEL.WEIGHTS", weights, flags=("--eval-only",))
    run(root, *again)
    assert (tmp_path / "again/inference" / DETECTIONS).read_text() == average
    assert results(tmp_path / "again")["svhn_test"]["bbox"] == found["bbox_ema"]

    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    image = sorted((root / "svhn/test").glob("*.png"))[0]
    scores = load_detector(weights, threshold=0.0)(image).scores.numpy()
    expected = [entry["score"] for entry in json.loads(average) if str(entry["image_id"]) == image.stem]
    np.testing.assert_allclose(np.sort(scores), np.sort(expected), atol=1e-4)


@pytest.mark.slow
def test_the_average_of_an_encoder_is_evaluated_and_exported(root: Path, tmp_path: Path) -> None:
    trained = tmp_path / "run"
    run(root, *command("pretrain_ssl.py", trained, *AVERAGE))
    found = results(trained)
    assert found.keys() == {"held_out", "held_out_ema"} and found["held_out"] != found["held_out_ema"]
    weights = torch.load(trained / "model_final_ema.pth", weights_only=True)["model"]
    tensors, metadata = read_encoder(trained / "encoder_ema.safetensors")
    assert tensors and all(torch.equal(value, weights[f"encoder.{name}"]) for name, value in tensors.items())
    assert metadata["results"] == found
    last = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    tensors, _ = read_encoder(trained / "encoder.safetensors")
    assert all(torch.equal(value, last[f"encoder.{name}"]) for name, value in tensors.items())

    evaluation = ("MODEL.WEIGHTS", trained / "model_final_ema.pth")
    run(root, *command("pretrain_ssl.py", tmp_path / "again", *evaluation, flags=("--eval-only",)))
    assert results(tmp_path / "again")["held_out"] == found["held_out_ema"]
    start = ("MODEL.WEIGHTS", trained / "encoder_ema.safetensors", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    done = run(root, *command("train_net.py", tmp_path / "detector", *start))
    assert "features of the pre-trained and the loaded encoder agree to 0.0e+00" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_and_resumed_run_in_float16_equals_an_uninterrupted_one(
    script: str, root: Path, tmp_path: Path
) -> None:
    keys = ("SOLVER.PRECISION", "float16", *AVERAGE, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = run(root, *command(script, straight, *keys))
    assert (done.stdout + done.stderr).count("SOLVER.PRECISION float16 is slow on a CPU") == 1
    run(root, *command(script, killed, *keys), status=-signal.SIGKILL, fault="pointer:2")
    assert "resumed at iteration 2" in run(root, *command(script, killed, *keys, flags=("--resume",))).stdout
    one, other = (torch.load(output / "model_final.pth", weights_only=True) for output in (straight, killed))
    assert all(equal(one[key], other[key]) for key in ("model", "optimizer", "scaler", "ema", "iteration"))
    assert rows(straight) == rows(killed) and all("grad_scale" in row for row in rows(straight))
