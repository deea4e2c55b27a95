"""Runs without what only POSIX systems have, and on Apple's GPU."""

from pathlib import Path

import pytest
import torch

from relvit_d2.config.config_file import adapt_to_machine
from relvit_d2.engine.precision import choose_precision
from relvit_d2.tasks import load_config
from tests.support.runs import equal, rows
from tests.support.scripts import command, run


def test_training_needs_nothing_that_windows_lacks(root: Path, tmp_path: Path) -> None:
    """Without these modules, signals, fork and descriptors over sockets, runs have the same losses."""
    short = ("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 0, "DATALOADER.NUM_WORKERS")
    for name, fault in (("usual", ""), ("hidden", "windows:0")):
        run(root, *command("pretrain_ssl.py", tmp_path / name / "pretrain", *short, 1), fault=fault)
        weights = ("MODEL.WEIGHTS", tmp_path / "usual/pretrain/encoder.safetensors")
        run(root, *command("train_net.py", tmp_path / name / "train", *short, 0, *weights), fault=fault)
    for part in ("pretrain", "train"):
        usual, hidden = (rows(tmp_path / name / part) for name in ("usual", "hidden"))
        assert usual and equal(usual, hidden)


def test_apples_gpu_is_chosen_with_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {device: load_config("configs/demo/streets.yaml", ["MODEL.DEVICE", device]) for device in ("cuda", "cpu")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert load_config("configs/demo/streets.yaml", []).MODEL.DEVICE == "mps"
    assert choose_precision("auto", torch.device("mps")).dtype == torch.float32
    for device, expected in (("cuda", "mps"), ("cpu", "cpu")):
        adapt_to_machine(saved[device])
        assert expected == saved[device].MODEL.DEVICE
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    adapt_to_machine(saved["cuda"])
    assert load_config("configs/demo/streets.yaml", []).MODEL.DEVICE == "cpu"
