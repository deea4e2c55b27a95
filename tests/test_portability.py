"""Runs without what only POSIX systems have, and on Apple's GPU."""

from pathlib import Path

import pytest
import torch

from relvit_d2.config.config_file import adapt_to_machine
from relvit_d2.engine.precision import choose_precision
from relvit_d2.tasks import load_config
from tests.support.runs import rows
from tests.support.scripts import command, run


@pytest.mark.slow
def test_training_needs_nothing_that_windows_lacks(root: Path, tmp_path: Path) -> None:
    """Without these modules, signals, fork and descriptors over sockets; pre-training's worker process is spawned."""
    short = ("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 0, "DATALOADER.NUM_WORKERS")
    for name, fault in (("usual", ""), ("hidden", "windows:0")):
        untested = ("DATASETS.TEST", "()")  # an evaluation would spawn another worker
        run(root, *command("pretrain_ssl.py", tmp_path / name, *short, 1, *untested), fault=fault)
    assert rows(tmp_path / "usual") == rows(tmp_path / "hidden") != []
    weights = ("MODEL.WEIGHTS", tmp_path / "hidden/encoder.safetensors")
    run(root, *command("train_net.py", tmp_path / "train", *short, 0, *weights), fault="windows:0")
    assert rows(tmp_path / "train")[-1]["bbox/AP"] >= 0


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
