"""The Python API: the results of the commands, in the calling process, which is as before afterwards."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import relvit_d2
from relvit_d2.conversion.checkpoint_file import read_file
from relvit_d2.conversion.encoder_file import read_encoder
from relvit_d2.engine.run_setup import LOGGERS
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import write_yolo, yolo_folder
from tests.support.runs import equal, rows
from tests.support.scripts import run, wait_for

CONFIG = "configs/custom.yaml"
FEW = {"SOLVER.MAX_ITER": 3, "SOLVER.WARMUP_ITERS": 0, "SOLVER.IMS_PER_BATCH": 2, "MODEL.DEVICE": "cpu"}
PRETRAIN: dict[str, Any] = FEW | {"PRETEXT.IMAGE_SIZE": 32}
TRAIN: dict[str, Any] = FEW | {
    "INPUT.MIN_SIZE_TRAIN": (32,),
    "INPUT.MIN_SIZE_TEST": 32,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    "DATALOADER.NUM_WORKERS": 0,
}


def state() -> list[Any]:
    """What a call must leave unchanged in this process."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    return [
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers],
        (sys.argv, sys.stdout, logging.raiseExceptions),
        multiprocessing.active_children(),
    ]


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_yolo(tmp_path_factory.mktemp("data") / "cells")


@pytest.fixture(scope="module")
def encoder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return relvit_d2.pretrain(data, tmp_path_factory.mktemp("pretrain") / "run", **PRETRAIN)


@pytest.fixture(scope="module")
def detector(data: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("train") / "run"
    return relvit_d2.train(data, output, config=CONFIG, weights=encoder, **TRAIN)


def words(keys: dict[str, Any]) -> list[object]:
    return [part for pair in keys.items() for part in pair]


def test_the_functions_train_the_same_models_as_the_commands(
    data: Path, encoder: Path, detector: Path, tmp_path: Path
) -> None:
    ours, output = encoder.parent, tmp_path / "pretrain"
    command = ("--config-file", "configs/ssl/custom.yaml", "--data", data, *words(PRETRAIN), "OUTPUT_DIR", output)
    run(tmp_path, "relvit-d2", "pretrain", *command)
    assert equal(read_encoder(encoder), read_encoder(output / encoder.name)) and rows(ours) == rows(output)
    command = ("--config-file", CONFIG, "--data", data, *words(TRAIN), "MODEL.WEIGHTS", encoder)
    run(tmp_path, "relvit-d2", "train", *command, "OUTPUT_DIR", tmp_path / "train")
    models = [read_file(folder / "model_final.pth")["model"] for folder in (detector, tmp_path / "train")]
    assert equal(*models) and rows(detector) == rows(tmp_path / "train")


def test_a_run_records_the_command_that_repeats_it(data: Path, encoder: Path) -> None:
    command = json.loads((encoder.parent / "run.json").read_text())["command"]
    assert command.startswith(f"relvit-d2 pretrain --config-file=configs/ssl/custom.yaml --data={data} SOLVER.MAX_ITER")
    assert command.endswith(f"OUTPUT_DIR {encoder.parent}")


def test_evaluate_returns_the_results_of_the_run_or_of_other_data(data: Path, detector: Path, tmp_path: Path) -> None:
    results = relvit_d2.evaluate(detector)
    assert results == json.loads((detector / "inference/results.json").read_text())
    assert results.keys() == {"cells_val"} and "AP" in results["cells_val"]["bbox"]
    shutil.copytree(data, tmp_path / "other")
    found = relvit_d2.evaluate(detector / "model_final.pth", tmp_path / "other", OUTPUT_DIR=tmp_path / "out")
    assert found == {"other_val": results["cells_val"]} and (tmp_path / "out/inference/results.json").is_file()


def test_log_lines_are_in_the_file_once_and_the_progress_on_stderr(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in ("one", "two", "two"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)  # also the file of the log
        relvit_d2.pretrain(data, tmp_path / folder, **PRETRAIN)
        lines = (tmp_path / folder / "log.txt").read_text().splitlines()
        assert sum("iter 3/3" in line for line in lines) == sum("run finished" in line for line in lines) == 1
    output, errors = capfd.readouterr()
    assert output == "" and errors.count("pretrain: 100 % (3 of 3, ") == 3 and "\r" not in errors


def test_warnings_are_printed(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data, tmp_path / "cells")
    (tmp_path / "cells/images/train/broken.png").write_bytes(b"no image")
    relvit_d2.pretrain(tmp_path / "cells/images/train", tmp_path / "run", **PRETRAIN)
    assert "warning: " in (errors := capfd.readouterr().err) and "broken.png" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_saved_run_and_reaches_the_handler_of_the_caller(
    number: signal.Signals, data: Path, tmp_path: Path
) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda number, _: received.append(number))

    def send() -> None:
        metrics = tmp_path / "run/metrics.json"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, None)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            relvit_d2.pretrain(data, tmp_path / "run", **PRETRAIN | {"SOLVER.MAX_ITER": 100_000})
    finally:
        thread.join()
        signal.signal(number, before)
    assert received == [number]
    done = len((tmp_path / "run/metrics.json").read_text().splitlines())
    assert (tmp_path / f"run/model_{done - 1:07d}.pth").is_file()


def test_a_call_works_in_another_thread(data: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: relvit_d2.pretrain(data, tmp_path / "run", **PRETRAIN))
    thread.start()
    thread.join()
    assert (tmp_path / "run/encoder.safetensors").is_file()


def test_errors_are_exceptions_and_leave_the_next_call_unharmed(
    data: Path, encoder: Path, detector: Path, tmp_path: Path
) -> None:
    new, nothing, first = tmp_path / "new", tmp_path / "nothing", read_encoder(encoder)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
        (relvit_d2.pretrain, (nothing, new), {}, "the data folder '.*nothing' does not exist"),
        (relvit_d2.pretrain, (data, new), {"SOLVER_MAX_ITER": 3}, "did you mean 'SOLVER.MAX_ITER'"),
        (relvit_d2.pretrain, (data, new), {"config": "no.yaml"}, "config file 'no.yaml' does not exist"),
        (relvit_d2.pretrain, (data, new), {"max_iter": 3}, "'max_iter' is neither an argument nor a config key"),
        (relvit_d2.pretrain, (data, new), {"--resume": True}, "'--resume' is neither an argument nor a config key"),
        (relvit_d2.pretrain, (data, new), {"OUTPUT_DIR": "x"}, "OUTPUT_DIR is the argument output"),
        (relvit_d2.pretrain, (data, encoder.parent), PRETRAIN, "--overwrite, or choose another OUTPUT_DIR"),
        (relvit_d2.train, (nothing, new), {}, "the data folder '.*nothing' does not exist"),
        (relvit_d2.train, (data, new), {"hours": 0}, "hours 0: give a number above 0"),
        (relvit_d2.train, (data, new), {"weights": nothing}, "weights '.*nothing' does not exist"),
        (relvit_d2.train, (data, new), {"config": CONFIG, "hours": 1}, "hours and pretrain belong to the recipe"),
        (relvit_d2.train, (data, new), {"weights": encoder, "pretrain": True}, "weights replace the pre-training"),
        (relvit_d2.train, (data, new), {"config": CONFIG, "weights": nothing} | TRAIN, "nothing' does not exist"),
        (relvit_d2.train, (data, encoder.parents[1] / "run/log.txt"), {"config": CONFIG} | TRAIN, "OUTPUT_DIR"),
        (relvit_d2.evaluate, (nothing,), {}, "'.*nothing' is not the folder of a run"),
        (relvit_d2.evaluate, (detector, nothing), {}, "the data folder '.*nothing' does not exist"),
        (relvit_d2.load_detector, (nothing,), {}, "weights '.*nothing' do not exist"),
        (relvit_d2.load_encoder, (nothing,), {}, "weights file '.*nothing' does not exist"),
    ]
    for function, arguments, keys, message in calls:
        before = state()
        with pytest.raises(UserError, match=message):
            function(*arguments, **keys)
        assert state() == before
    again = relvit_d2.pretrain(data, encoder.parent, overwrite=True, **PRETRAIN)
    assert again == encoder and equal(read_encoder(again), first)


def test_a_data_set_may_change_between_calls(data: Path, tmp_path: Path) -> None:
    """Another folder of the same name with other classes, also for a subset of it."""
    classes = []
    for number in range(2):
        folder = tmp_path / str(number) / "cells"
        shutil.copytree(data, folder)
        if number:
            (folder / "data.yaml").write_text((folder / "data.yaml").read_text().replace("cat", "cow"))
        keys = TRAIN | {"DATASETS.TRAIN": ("cells_train[:1]",), "SOLVER.MAX_ITER": 1, "DATASETS.TEST": ()}
        output = relvit_d2.train(folder, tmp_path / f"run{number}", config=CONFIG, **keys)
        classes.append(json.loads((output / "classes.json").read_text()))
    assert "cat" in classes[0] and classes[1] == [name.replace("cat", "cow") for name in classes[0]]


@pytest.mark.slow
def test_the_recipe_runs_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = yolo_folder(tmp_path / "cells", *(f"train/{number}" for number in range(6)), "val/6", "val/7")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("a subprocess was started")

    monkeypatch.setattr("subprocess.Popen.__init__", fail)
    keys: dict[str, Any] = {"DATALOADER.NUM_WORKERS": 0, "SOLVER.MAX_ITER": 20, "MODEL.ENCODER.NAME": "vit_nano"}
    detector = relvit_d2.train(data, tmp_path / "run", hours=0.1, pretrain=True, **keys)
    assert detector == tmp_path / "run/detector" and (detector / "report.html").is_file()
    assert list((tmp_path / "run/predictions").glob("*.png"))
    weights = tmp_path / "run/pretraining/encoder.safetensors"
    again = relvit_d2.train(data, tmp_path / "again", hours=0.1, weights=weights, **keys)
    assert "NAME: vit_nano" in (again.parent / "recipe.yaml").read_text()
