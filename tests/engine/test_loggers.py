"""Weights & Biases and MLflow: one run for a resumed run, the values of metrics.json, no effect on training."""

import importlib.util
import signal
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from relvit_d2.engine.loggers import Tracker
from relvit_d2.engine.signals import Interrupted
from tests.support.runs import equal, rows
from tests.support.scripts import command, fails, run

BOTH = ("LOGGERS", "('wandb','mlflow')")


def test_unknown_loggers_and_missing_packages_are_reported_before_anything_is_written(
    root: Path, tmp_path: Path
) -> None:
    wrong = command("pretrain_ssl.py", tmp_path / "out", "LOGGERS", "('wandv',)")
    assert "LOGGERS 'wandv' is unknown; give wandb, mlflow; did you mean 'wandb'" in fails(root, *wrong)
    for name in ("wandb", "mlflow"):
        if not importlib.util.find_spec(name):
            error = fails(root, *command("train_net.py", tmp_path / "out", "LOGGERS", f"('{name}',)"))
            assert f"needs the package {name}: run pip install 'relvit_d2[loggers]'" in error
    assert not (tmp_path / "out").exists()


class Recorder(Tracker):
    """A tracker that records, and fails at some iteration or at the end."""

    name = "recorder"

    def __init__(self, failing: int | str = "") -> None:
        super().__init__()
        self.failing = failing
        self.calls: list[tuple[object, object]] = []

    def send(self, metrics: Mapping[str, float], iteration: int) -> None:
        self.calls.append((iteration, dict(metrics)))
        if iteration == self.failing:
            raise ConnectionError("no server")

    def end(self, status: str) -> None:
        self.calls.append(("end", status))
        if self.failing == "end":
            raise ConnectionError("no server")


def record(tracker: Recorder, first: int = 0) -> None:
    """Write the loss of four iterations from ``first`` on, and in the third one an accuracy."""
    with EventStorage(first) as storage:
        for iteration in range(first, first + 4):
            storage.put_scalar("loss", float(iteration))
            if iteration == first + 2:
                storage.put_scalar("accuracy", 0.5)
            tracker.write()
            storage.step()
    tracker.close()


def test_each_metric_is_sent_once_with_its_iteration() -> None:
    tracker = Recorder()
    tracker.sent = 0  # as of a resumed run
    record(tracker)
    assert tracker.calls == [(1, {"loss": 1}), (2, {"loss": 2, "accuracy": 0.5}), (3, {"loss": 3}), ("end", "FINISHED")]


def test_a_failing_tracker_is_reported_and_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    for failing, count, lost in ((1, 2, "the metrics of iteration 1 were"), ("end", 5, "the end of the run was")):
        tracker = Recorder(failing)
        record(tracker)
        assert len(tracker.calls) == count
        assert caplog.records[-1].getMessage().startswith(f"LOGGERS recorder: {lost} not sent (no server): no more")


def test_the_end_of_a_run_has_its_status() -> None:
    for error, status in ((Interrupted(signal.SIGTERM), "KILLED"), (ValueError(), "FAILED")):
        tracker = Recorder()
        with suppress(Interrupted, ValueError):
            try:
                raise error
            finally:
                tracker.close()
        assert tracker.calls == [("end", status)]


@pytest.fixture()
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings for runs without a server; return MLflow's database."""
    for name in ("wandb", "mlflow"):
        pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(tmp_path / "artifacts"))
    return tmp_path / "mlflow.db"


@pytest.mark.slow
def test_a_resumed_run_is_one_run_with_the_values_of_metrics_json(root: Path, tmp_path: Path, offline: Path) -> None:
    keys = ("SOLVER.MAX_ITER", 44, "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 12)
    out = tmp_path / "out"
    run(root, *command("pretrain_ssl.py", tmp_path / "plain", *keys))
    run(root, *command("pretrain_ssl.py", out, *keys, *BOTH), status=-signal.SIGKILL, fault="step:41")
    run(root, *command("pretrain_ssl.py", out, *keys, *BOTH, flags=("--resume",)))
    one, other = (torch.load(tmp_path / f"{name}/model_final.pth", weights_only=True) for name in ("plain", "out"))
    assert equal(one["model"], other["model"]) and rows(tmp_path / "plain") == rows(out)

    values = {row["iteration"]: row for row in rows(out)}
    runs = sorted((out / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and {path.name.rpartition("-")[2] for path in runs} == {other["run"]}
    sent = b"".join(file.read_bytes() for path in runs for file in path.glob("*.wandb"))
    for step, row in values.items():  # W&B's own process, which was killed too, may have lost the steps before 39
        assert step not in (39, 43) or repr(row["total_loss"]).encode() in sent
        assert step in (11, 19, 23, 35, 39, 43) or repr(row["total_loss"]).encode() not in sent

    database = sqlite3.connect(offline)
    assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    for name, steps in {
        "total_loss": [11, 19, 23, 35, 39, 43],
        "held_out/loss_relation": [11, 23, 35, 43],
    }.items():
        found = database.execute("SELECT step, value FROM metrics WHERE key = ? ORDER BY step", (name,)).fetchall()
        assert found == [(step, pytest.approx(values[step][name])) for step in steps]


@pytest.mark.slow
def test_only_the_first_of_two_processes_logs(root: Path, tmp_path: Path, offline: Path) -> None:
    run(root, *command("pretrain_ssl.py", tmp_path / "out", "LOGGERS", "('mlflow',)", flags=("--num-gpus", 2)))
    found = sqlite3.connect(offline).execute("SELECT step FROM metrics WHERE key = 'total_loss'").fetchall()
    assert found == [(5,)]
