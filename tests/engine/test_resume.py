"""A killed and resumed run is the straight run, to the last bit, wherever it was killed."""

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
RUN = f"SOLVER.MAX_ITER {ITERATIONS} SOLVER.CHECKPOINT_PERIOD 5 TEST.EVAL_PERIOD 12 DATALOADER.NUM_WORKERS".split()

# In a row, counted from each start: where the run is killed, and the iteration from which it goes on then.
KILLS = [
    ("step:23", 20),
    ("checkpoint:2", 24),  # of iteration 24; that of 23, before the evaluation, is whole
    ("pointer:1", 24),
    ("evaluation:2", 36),  # the first one is that of iteration 23, done once more
]


@pytest.fixture(scope="module")
def straight(root: Path) -> dict[str, Path]:
    """The output folders of runs that nothing disturbed."""
    for script in SCRIPTS:
        run(root, *command(script, root / script, *RUN, 0))
    return {script: root / script for script in SCRIPTS}


def assert_same_run(one: Path, other: Path) -> None:
    first, second = (torch.load(output / "model_final.pth", weights_only=True) for output in (one, other))
    for key in ("model", "optimizer", "iteration"):
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


@pytest.mark.parametrize(("script", "workers"), [("pretrain_ssl.py", 2), ("train_net.py", 0)])
def test_killed_anywhere_and_resumed(
    script: str, workers: int, root: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    resume: tuple[str, ...] = ()
    for fault, resumes_at in KILLS:
        run(root, *command(script, tmp_path, *RUN, workers, flags=resume), status=-signal.SIGKILL, fault=fault)
        pointer = (tmp_path / "last_checkpoint").read_text()
        kept = torch.load(tmp_path / pointer, weights_only=True)
        assert kept["iteration"] + 1 == resumes_at, fault
        resume = ("--resume",)
    # The last stretch with other loader processes: no result depends on them.
    done = run(root, *command(script, tmp_path, *RUN, 2 - workers, flags=resume))
    assert "resumed at iteration 36" in done.stdout
    assert_same_run(straight[script], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "workers"), [("pretrain_ssl.py", 0), ("train_net.py", 2)])
def test_killed_at_random_moments_25_times(
    script: str, workers: int, root: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    draw, kills, trained = random.Random(script), 0, 0
    times = [json.loads(line).get("time", 0.0) for line in (straight[script] / "metrics.json").read_text().splitlines()]
    stretch = sum(times) / 25  # a kill comes after half of that on average, so that 25 of them find a run to kill
    metrics = tmp_path / "metrics.json"
    given = command(script, tmp_path, *RUN, workers, "SOLVER.CHECKPOINT_PERIOD", 1, flags=("--resume",))
    while kills < 25:
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        with started(root, *given) as process:
            if draw.random() < 0.1:  # while it starts
                time.sleep(draw.uniform(0, 6))
            else:
                while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, stretch))
                trained += 1
            assert process.poll() is None, "".join(process.communicate())
            process.kill()
        kills += 1
    run(root, *given)
    assert trained > 12
    assert_same_run(straight[script], tmp_path)


def test_resume_in_an_empty_folder_starts_at_zero_and_says_so(root: Path, tmp_path: Path) -> None:
    once = ("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    done = run(root, *command("pretrain_ssl.py", tmp_path, *once, flags=("--resume",)))
    assert f"no checkpoint in '{tmp_path}': starting at iteration 0" in done.stdout


def test_resume_refuses_another_config_unless_told(root: Path, straight: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(straight["pretrain_ssl.py"], output)
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


def test_a_new_run_in_a_used_folder_is_never_continued_by_the_old_one(
    root: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(straight["pretrain_ssl.py"], output)
    again = command("pretrain_ssl.py", output, *RUN, 0)
    killed = run(root, *again, status=-signal.SIGKILL, fault="step:2")
    assert "holds an earlier run" in killed.stdout
    assert not (output / "last_checkpoint").exists()


@pytest.mark.parametrize(
    ("number", "script", "flags"),
    [
        (signal.SIGTERM, "train_net.py", ()),
        (signal.SIGINT, "pretrain_ssl.py", ()),
        pytest.param(signal.SIGTERM, "pretrain_ssl.py", ("--num-gpus", "2"), marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_after_the_iteration_with_a_checkpoint(
    number: int, script: str, flags: tuple[str, ...], root: Path, tmp_path: Path
) -> None:
    given = command(script, tmp_path, "SOLVER.MAX_ITER", 10_000, "DATALOADER.NUM_WORKERS", 2, flags=flags)
    metrics = tmp_path / "metrics.json"
    with started(root, *given) as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process)
        os.killpg(process.pid, number)  # as a terminal and Slurm do: the loader's processes get it too
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output + errors
    assert errors.count("stopped by") == 1
    assert errors.count("finishing this iteration; once more ends at once") == 1
    assert "Traceback" not in output + errors
    name = (tmp_path / "last_checkpoint").read_text()
    kept = torch.load(tmp_path / name, weights_only=True)["iteration"]
    assert f"stopping after iteration {kept}" in output
    assert json.loads(metrics.read_text().splitlines()[-1])["iteration"] == kept


@pytest.mark.parametrize("flags", [(), pytest.param(("--num-gpus", "2"), marks=pytest.mark.slow)])
def test_all_processes_die_with_the_script(flags: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    given = command("train_net.py", tmp_path, "SOLVER.MAX_ITER", 10_000, "DATALOADER.NUM_WORKERS", 2, flags=flags)
    metrics = tmp_path / "metrics.json"
    with started(root, *given) as process:
        wait_for(lambda: metrics.exists() and bool(metrics.read_text()), process)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(children) >= 2
        process.kill()
        output, _ = process.communicate()  # returns only when nobody holds the pipes any more
        assert "stopping after" not in output  # a tidy end would still write, where another run may have begun
        wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children), None, seconds=10)
