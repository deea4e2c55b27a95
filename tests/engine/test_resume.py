"""A killed and resumed run is bitwise identical to an uninterrupted run."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import equal, rows
from tests.support.scripts import SCRIPTS, command, digests, fails, run, started, wait_for

ITERATIONS = 44
AVERAGE = ("SOLVER.EMA.ENABLED", "True")
RUN = [
    *f"SOLVER.MAX_ITER {ITERATIONS} SOLVER.CHECKPOINT_PERIOD 5 TEST.EVAL_PERIOD 12".split(),
    *AVERAGE,
    "DATALOADER.NUM_WORKERS",
]

# Successive kills, counted from each start, and the iteration at which the run then resumes.
KILLS = [
    ("step:23", 20),
    ("checkpoint:2", 24),  # of iteration 24; that of 23, before the evaluation, is complete
    ("pointer:1", 24),
    ("evaluation:4", 36),  # of the average; the first two repeat those of iteration 23
]


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> dict[str, Path]:
    """Return the output folders of uninterrupted runs."""
    for script in SCRIPTS:
        run(root, *command(script, root / script, *RUN, 0))
    return {script: root / script for script in SCRIPTS}


def assert_same_run(one: Path, other: Path) -> None:
    first, second = (torch.load(output / "model_final.pth", weights_only=True) for output in (one, other))
    for key in ("model", "optimizer", "ema", "iteration"):
        assert equal(first[key], second[key]), key
    assert [row["iteration"] for row in rows(other)] == list(range(ITERATIONS))
    assert rows(one) == rows(other)
    points = []
    for output in (one, other):
        board = EventAccumulator(str(output))
        board.Reload()
        points.append([(event.step, event.value) for event in board.Scalars("total_loss")])
    assert [step for step, _ in points[0]] == [19, 39, 43]
    assert points[0] == points[1]
    assert not list(other.rglob("*.part"))


@pytest.mark.parametrize(
    ("script", "workers"), [("pretrain_ssl.py", 2), pytest.param("train_net.py", 0, marks=pytest.mark.slow)]
)
def test_killed_anywhere_and_resumed(
    script: str, workers: int, root: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    resume: tuple[str, ...] = ()
    for fault, resumes_at in KILLS:
        run(root, *command(script, tmp_path, *RUN, workers, flags=resume), status=-signal.SIGKILL, fault=fault)
        pointer = (tmp_path / "last_checkpoint").read_text()
        kept = torch.load(tmp_path / pointer, weights_only=True)
        assert kept["iteration"] + 1 == resumes_at, fault
        resume = ("--resume",)
    # Damage to the newest checkpoint and the use of another number of workers do not affect the result.
    newest = tmp_path / (tmp_path / "last_checkpoint").read_text()
    newest.write_bytes(newest.read_bytes()[:-100])
    done = run(root, *command(script, tmp_path, *RUN, 2 - workers, flags=resume))
    assert f"passed over: '{newest}' is incomplete or damaged" in done.stdout
    assert "resumed at iteration 35" in done.stdout
    assert_same_run(uninterrupted[script], tmp_path)


@pytest.mark.parametrize(
    ("script", "epochs"),
    [
        ("pretrain_ssl.py", (29.3, 3.3, 8)),
        pytest.param("train_net.py", (14.5, 1.7, 4), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_of_epochs_continues_as_one_of_iterations(
    script: str, epochs: tuple[float, float, float], root: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    run_length, checkpoints, evaluations = epochs  # of 12 images
    keys: tuple[object, ...] = (*AVERAGE, "SOLVER.MAX_ITER", 0, "SOLVER.EPOCHS", run_length)
    keys += ("TEST.EVAL_EPOCHS", evaluations)
    keys += ("SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.CHECKPOINT_EPOCHS", checkpoints)
    run(root, *command(script, tmp_path, *keys), status=-signal.SIGKILL, fault="step:23")
    assert "resumed at iteration 20" in run(root, *command(script, tmp_path, *RUN, 0, flags=("--resume",))).stdout
    assert (tmp_path / "config.yaml").read_text().replace(str(tmp_path), "") == (
        uninterrupted[script] / "config.yaml"
    ).read_text().replace(str(uninterrupted[script]), "")
    assert_same_run(uninterrupted[script], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "workers"), [("pretrain_ssl.py", 0), ("train_net.py", 2)])
def test_killed_at_random_moments_25_times(
    script: str, workers: int, root: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    draw, kills, trained = random.Random(script), 0, 0
    times = [
        json.loads(line).get("time", 0.0) for line in (uninterrupted[script] / "metrics.json").read_text().splitlines()
    ]
    interval = sum(times) / 25  # a kill comes after half of it on average, so that 25 kills fit into the run
    metrics = tmp_path / "metrics.json"
    arguments = command(script, tmp_path, *RUN, workers, "SOLVER.CHECKPOINT_PERIOD", 1, flags=("--resume",))
    while kills < 25:
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        with started(root, *arguments) as process:
            if draw.random() < 0.1:  # while it starts
                time.sleep(draw.uniform(0, 6))
            else:
                while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, interval))
                trained += 1
            assert process.poll() is None, "".join(process.communicate())
            process.kill()
        kills += 1
    run(root, *arguments)
    assert trained > 12
    assert_same_run(uninterrupted[script], tmp_path)


def test_resume_in_an_empty_folder_starts_at_zero_and_logs_it(root: Path, tmp_path: Path) -> None:
    once = ("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    done = run(root, *command("pretrain_ssl.py", tmp_path, *once, flags=("--resume",)))
    assert f"no checkpoint in '{tmp_path}': starting at iteration 0" in done.stdout


def test_resume_refuses_another_config_unless_allowed(
    root: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(uninterrupted["pretrain_ssl.py"], output)
    before = digests(output)
    changed = command("pretrain_ssl.py", output, *RUN, 0, "SOLVER.BASE_LR", 5e-4, "SEED", 4, flags=("--resume",))
    sentence = fails(root, *changed)
    assert "SOLVER.BASE_LR 0.001, but now it is 0.0005" in sentence or "SEED 0, but now it is 4" in sentence
    assert before == digests(output)
    free = ("TEST.EVAL_PERIOD", 0, "DATALOADER.NUM_WORKERS", 1, "SOLVER.CHECKPOINT_PERIOD", 0)
    run(root, *command("pretrain_ssl.py", output, *RUN, 0, *free, flags=("--resume",)))
    more = (*RUN, 0, "SOLVER.MAX_ITER", ITERATIONS + 1, "DATASETS.TEST", "()")
    run(root, *command("pretrain_ssl.py", output, *more, flags=("--resume", "--allow-changes")))
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == ITERATIONS


def test_a_run_is_overwritten_on_request_only_and_then_not_continued(
    root: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(uninterrupted["pretrain_ssl.py"], output)
    before = digests(output)
    sentence = fails(root, *command("pretrain_ssl.py", output, *RUN, 0))
    assert f"OUTPUT_DIR '{output}' holds a run (last_checkpoint, model_final.pth, encoder.safetensors): " in sentence
    assert "continue it with --resume, replace it with --overwrite, or choose another OUTPUT_DIR" in sentence
    assert before == digests(output)
    again = command("pretrain_ssl.py", output, *RUN, 0, flags=("--overwrite",))
    killed = run(root, *again, status=-signal.SIGKILL, fault="step:2")
    assert "holds an earlier run" in killed.stdout
    assert not (output / "last_checkpoint").exists()
    assert_same_run(uninterrupted["pretrain_ssl.py"], output / "earlier_run")


@pytest.mark.parametrize(
    ("number", "script", "flags"),
    [
        (signal.SIGTERM, "train_net.py", ()),
        (signal.SIGINT, "pretrain_ssl.py", ()),
        pytest.param(signal.SIGTERM, "pretrain_ssl.py", ("--num-gpus", "2"), marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_after_a_checkpoint(
    number: int, script: str, flags: tuple[str, ...], root: Path, tmp_path: Path
) -> None:
    arguments = command(script, tmp_path, "SOLVER.MAX_ITER", 10_000, "DATALOADER.NUM_WORKERS", 2, flags=flags)
    metrics = tmp_path / "metrics.json"
    with started(root, *arguments) as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process)
        os.killpg(process.pid, number)  # to all processes, workers included, as a terminal and Slurm do
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output + errors
    assert errors.count("stopped by") == 1
    assert errors.count("finishing this iteration; repeat the signal to end immediately") == 1
    assert "Traceback" not in output + errors
    name = (tmp_path / "last_checkpoint").read_text()
    kept = torch.load(tmp_path / name, weights_only=True)["iteration"]
    assert f"stopping after iteration {kept}" in output
    assert json.loads(metrics.read_text().splitlines()[-1])["iteration"] == kept


@pytest.mark.parametrize("flags", [(), pytest.param(("--num-gpus", "2"), marks=pytest.mark.slow)])
def test_all_processes_end_with_the_script(flags: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    arguments = command("train_net.py", tmp_path, "SOLVER.MAX_ITER", 10_000, "DATALOADER.NUM_WORKERS", 2, flags=flags)
    metrics = tmp_path / "metrics.json"
    with started(root, *arguments) as process:
        wait_for(lambda: metrics.exists() and bool(metrics.read_text()), process)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(children) >= 2
        process.kill()
        output, _ = process.communicate()  # returns only when no process holds the pipes
        assert "stopping after" not in output  # no process may write after the kill
        wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children), None, seconds=10)


def test_one_training_per_folder(root: Path, tmp_path: Path) -> None:
    """A second training is refused, an evaluation is not; a lock of a killed process does not matter."""
    arguments = command("train_net.py", tmp_path, "SOLVER.MAX_ITER", 10_000, "DATALOADER.NUM_WORKERS", 2)
    resume = command("train_net.py", tmp_path, "SOLVER.MAX_ITER", 10_000, flags=("--resume",))
    with started(root, *arguments) as process:
        wait_for((tmp_path / "last_checkpoint").exists, process)
        for second in (arguments, resume):
            sentence = fails(root, *second)
            assert f"OUTPUT_DIR '{tmp_path}' is in use by another training, process {process.pid} on " in sentence
        evaluation = ("MODEL.WEIGHTS", tmp_path / (tmp_path / "last_checkpoint").read_text(), "OUTPUT_DIR", tmp_path)
        run(root, *command("train_net.py", tmp_path, *evaluation, flags=("--eval-only",)))
        assert process.poll() is None
        process.kill()
        process.wait()
        reached = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)["iteration"]
        last = ("SOLVER.MAX_ITER", reached + 2, "DATASETS.TEST", "()")
        changed = command("train_net.py", tmp_path, *last, flags=("--resume", "--allow-changes"))
        done = run(root, *changed)
    assert f"process {process.pid}, ended without releasing its lock" in done.stderr
    assert not (tmp_path / ".run.json").exists()
    (tmp_path / ".run.json").write_text(json.dumps({"host": "elsewhere", "process": 7}))
    done = run(root, *changed)
    assert "in use by process 7 on elsewhere; whether it has ended cannot be known here" in done.stderr
