"""Runs with several processes or accumulated gradients equal those of one process; a failure is reported once."""

import argparse
import json
import os
import random
import re
import signal
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image
from torch.multiprocessing import ProcessContext, start_processes
from torch.nn.parallel import DistributedDataParallel

from relvit_d2.classification.run import split
from relvit_d2.data.classification.image_folder import read_tree
from relvit_d2.data.images import similarity
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.run import build_trainer, resolve_config, training_batches, training_records
from relvit_d2.engine import distributed
from relvit_d2.engine.signals import Interrupted
from relvit_d2.tasks import load_config
from relvit_d2.utils.randomness import seed_everything
from tests.support import classifiers
from tests.support.labelled_folders import draw_trees
from tests.support.runs import equal, rows
from tests.support.scripts import SCRIPTS, command, fails, kill_one, run, started, wait_for, workers

TWO = ("--num-gpus", 2)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def test_pretraining_does_not_depend_on_processes_or_parts(root: Path, tmp_path: Path) -> None:
    three = ("SOLVER.MAX_ITER", 3, "SOLVER.GRAD_ACCUM_STEPS")
    run(root, *command("pretrain_ssl.py", tmp_path / "one", *three, 1))
    run(root, *command("pretrain_ssl.py", tmp_path / "parts", *three, 4))
    run(root, *command("pretrain_ssl.py", tmp_path / "two", *three, 2, flags=TWO))
    run(root, *TORCHRUN, *command("pretrain_ssl.py", tmp_path / "torchrun", *three, 1))
    one = weights(tmp_path / "one")
    first, *_, last = ((tmp_path / "one/metrics.json").read_text()).splitlines()
    assert json.loads(first)["total_loss"] != json.loads(last)["total_loss"]
    for name in ("parts", "two", "torchrun"):
        other = weights(tmp_path / name)
        for key, value in one.items():
            # AdamW normalises gradients, so that a gradient of rounding errors gives a step in a random direction.
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=2e-6)
        held_out = [
            json.loads((tmp_path / n / "inference/results.json").read_text())["held_out"] for n in ("one", name)
        ]
        assert held_out[1] == pytest.approx(held_out[0], rel=1e-3)


def gradients(folder: str, parts: int) -> None:
    """In each process: save the gradient of its batches and that of the distributed step."""
    overrides = ["SOLVER.IMS_PER_BATCH", "8", "DATASETS.TRAIN", "('svhn_train',)", "DATASETS.TEST", "()"]
    overrides += ["SOLVER.CLIP_GRADIENTS.ENABLED", "False", "SOLVER.GRAD_ACCUM_STEPS", str(parts), "OUTPUT_DIR", folder]
    unresolved = load_config("configs/demo/streets.yaml", overrides)
    records = training_records(unresolved)
    cfg = resolve_config(unresolved, records)
    seed_everything(cfg.SEED, "model")
    model = build_detector(cfg)
    batches = iter(training_batches(cfg, records, 0))
    seed_everything(cfg.SEED, "iteration", 0, comm.get_rank())
    with EventStorage(0):
        for _ in range(parts):
            sum(model(next(batches)).values()).backward()
    local = {name: p.grad / parts for name, p in model.named_parameters()}
    model.zero_grad()

    trainer = build_trainer(cfg, model, records, {})
    trainer.optimizer.step = lambda: None  # type: ignore[assignment, misc]
    trainer.max_iter = 1
    trainer.checkpointer.save_dir = ""
    trainer.train()
    reduced = {name: p.grad for name, p in model.named_parameters()}
    torch.save((local, reduced), f"{folder}/{comm.get_rank()}.pt")
    comm.synchronize()


@pytest.mark.parametrize(("processes", "parts"), [(2, 1), (1, 2)])
def test_a_detectors_gradient_is_the_mean_over_processes_and_parts(
    processes: int, parts: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(gradients, processes, dist_url="auto", args=(str(tmp_path), parts))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for name, reduced in found[0][1].items():
        mean = torch.stack([local[name] for local, _ in found]).mean(0)
        torch.testing.assert_close(reduced, mean, rtol=1e-4, atol=1e-6)
        assert torch.equal(reduced, found[-1][1][name])
    if processes > 1:  # else the mean is trivial
        assert any(not torch.allclose(found[0][0][name], found[1][0][name]) for name in found[0][0])


def split_here(folder: str) -> None:
    """In each process: save which images are held out and how many were decoded."""
    decoded: list[object] = []
    read = similarity.fingerprint_file
    similarity.fingerprint_file = lambda image: decoded.append(image) or read(image)  # type: ignore[func-returns-value]
    train, held = split(read_tree(Path(folder, "images")), 0.25, seed=0)
    found = {"held": list(map(str, held.images)), "train": len(train), "decoded": len(decoded)}
    Path(folder, f"{comm.get_rank()}.json").write_text(json.dumps(found))


def test_one_process_splits_the_classes_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for number in range(24):
        path = tmp_path / f"images/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 50).save(path)
    launch(split_here, 2, dist_url="auto", args=(str(tmp_path),))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (len(first["held"]), first["train"], first["decoded"]) == (6, 18, 24)
    assert second == first | {"decoded": 0}


@pytest.mark.parametrize("launcher", [(), pytest.param(TORCHRUN, marks=pytest.mark.slow)])
def test_the_failing_process_reports_once_and_nothing_hangs(
    launcher: tuple[object, ...], root: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    arguments = command("train_net.py", tmp_path, "SOLVER.MAX_ITER", 10_000, flags=() if launcher else TWO)
    done = run(root, *launcher, *arguments, status=1, fault="raise:2:1")
    assert done.stderr.count("ZeroDivisionError: on demand") == 1
    assert "closed by peer" not in done.stderr
    assert time.monotonic() - began < 120


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_reported(rank: int, root: Path, tmp_path: Path) -> None:
    arguments = command("train_net.py", tmp_path, "SOLVER.MAX_ITER", 10_000, flags=TWO)
    sentence = fails(root, *arguments, fault=f"step:2:{rank}")
    assert f"process {rank} was killed (SIGKILL)" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_a_killed_process_and_the_run_resumes(rank: int, root: Path, tmp_path: Path) -> None:
    arguments = ("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 2)
    run(root, *command("pretrain_ssl.py", tmp_path / "straight", *arguments, flags=TWO))
    elastic = (*TORCHRUN, "--max-restarts", 2)
    # Each start of the killed rank ends after five steps.
    done = run(root, *elastic, *command("pretrain_ssl.py", tmp_path / "run", *arguments), fault=f"step:5:{rank}")
    assert "resumed at iteration 4" in done.stdout
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "straight"))


@pytest.mark.slow
def test_torchrun_does_not_repeat_a_user_error(root: Path, tmp_path: Path) -> None:
    elastic = (*TORCHRUN, "--max-restarts", 3)
    done = run(root, *elastic, *command("pretrain_ssl.py", tmp_path, "SOLVER.IMS_PER_BATCH", 3), status=1)
    assert done.stderr.count("error: SOLVER.IMS_PER_BATCH 3 is not a multiple of 2") == 1


@pytest.mark.slow
def test_an_error_after_a_restart_by_torchrun_is_printed(root: Path, tmp_path: Path) -> None:
    elastic = (*TORCHRUN, "--max-restarts", 1)
    done = run(root, *elastic, *command("pretrain_ssl.py", tmp_path), status=1, fault="raise:2:1")
    assert done.stderr.count("ZeroDivisionError: on demand") == 2


@pytest.mark.slow
def test_torchrun_may_keep_its_store_for_itself(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    elastic = (*TORCHRUN, "--max-restarts", 1)
    done = run(root, *elastic, *command("pretrain_ssl.py", tmp_path / "bad", "SOLVER.IMS_PER_BATCH", 3), status=1)
    assert done.stderr.count("error: SOLVER.IMS_PER_BATCH 3 is not a multiple of 2") == 2
    done = run(root, *elastic, *command("pretrain_ssl.py", tmp_path / "run"), fault="step:5:1")
    assert "resumed at iteration 3" in done.stdout


SLOW = pytest.mark.slow
CASES = [("pretrain_ssl.py", TWO), ("train_net.py", ()), ("train_cls.py", ())]
ALL_SCRIPTS = (*SCRIPTS, "train_cls.py")


@pytest.mark.parametrize(
    ("script", "flags", "kills"),
    [(*case, 1) for case in CASES]
    + [pytest.param(script, flags, 20, marks=SLOW) for script in ALL_SCRIPTS for flags in ((), TWO)],
)
def test_a_killed_worker_ends_the_run_with_one_sentence(
    script: str, flags: tuple[object, ...], kills: int, root: Path, tmp_path: Path
) -> None:
    more = ("SOLVER.MAX_ITER", 100_000, "DATALOADER.NUM_WORKERS", 2, "TEST.EVAL_PERIOD", 40)
    if script == "train_cls.py":
        keys = ("SOLVER.CHECKPOINT_PERIOD", 20, "INPUT.VIEW.CROP", "resized")
        draw_trees(tmp_path / "trees", mixed=True)
        arguments = classifiers.command(tmp_path / "trees", tmp_path, *more, *keys, flags=(*flags, "--resume"))
    else:
        arguments = command(script, tmp_path, *more, flags=(*flags, "--resume"))
    metrics, pointer = tmp_path / "metrics.json", tmp_path / "last_checkpoint"
    draw = random.Random(f"{script} {flags}")
    for _ in range(kills):
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        with started(root, *arguments) as process:
            wait_for(lambda: pointer.exists() and metrics.stat().st_mtime_ns > before, process, 600)  # noqa: B023
            time.sleep(draw.uniform(0, 2))
            wait_for(lambda: kill_one(workers(process.pid, flags), draw), process)
            output, errors = process.communicate(
                timeout=60
            )  # at most 15 s on an idle machine; returns only when no process holds the pipes
        assert process.returncode == 1, output + errors
        assert errors.count("error: ") == errors.count("was killed (SIGKILL), probably for lack of memory") == 1
        assert "Traceback" not in output + errors and "leaked" not in errors
        torch.load(tmp_path / pointer.read_text(), weights_only=True)


def test_a_full_disk_from_the_start_is_one_sentence(root: Path, tmp_path: Path) -> None:
    assert "could not be written" in fails(root, *command("train_net.py", tmp_path, flags=TWO), fault="full:300")


@pytest.mark.parametrize("flags", [(), pytest.param(TWO, marks=pytest.mark.slow)])
def test_out_of_memory_names_the_batch_that_fits(flags: tuple[object, ...], root: Path, tmp_path: Path) -> None:
    arguments = command("train_net.py", tmp_path, "SOLVER.MAX_ITER", 10_000, flags=flags)
    sentence = fails(root, *arguments, fault="memory:4")
    fits = re.search(r"raise SOLVER.GRAD_ACCUM_STEPS \(now 1\) or lower SOLVER.IMS_PER_BATCH \(now 4; (.*)\)", sentence)
    assert fits
    assert re.fullmatch(
        "relvit-d2 analyze measures how many fit" if flags else r"about [1-9]\d* fit at a time", fits[1]
    )
    assert sentence.endswith("then continue with --resume")
    checkpoint = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)
    assert checkpoint["iteration"] == 1


@pytest.mark.slow
def test_the_process_whose_loss_is_not_finite_names_its_images(root: Path, tmp_path: Path) -> None:
    arguments = command("pretrain_ssl.py", tmp_path, "SOLVER.MAX_ITER", 10_000, flags=TWO)
    assert "became nan at iteration 1, " in fails(root, *arguments, fault="nan:2:1")
    assert [path.name for path in tmp_path.glob("not_finite_*.json")] == ["not_finite_1.json"]


def test_an_error_before_the_rendezvous_is_reported_once(root: Path, tmp_path: Path) -> None:
    done = run(root, *TORCHRUN, *command("train_net.py", tmp_path, flags=TWO), status=1)
    assert done.stderr.count("error: torchrun starts the processes") == 1


@pytest.mark.slow
def test_a_full_disk_is_reported_also_on_a_signal(root: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.json"
    arguments = command(
        "pretrain_ssl.py", tmp_path, "SOLVER.MAX_ITER", 10_000, "SOLVER.CHECKPOINT_PERIOD", 0, flags=TWO
    )
    with started(root, *arguments, fault="full:1000000") as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.count("could not be written") == 1
    assert "stopped by" not in errors


def launcher() -> argparse.Namespace:
    return argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0)


def test_a_signal_before_the_processes_start_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "start_processes", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with handlers_kept(), pytest.raises(Interrupted, match="SIGTERM"):
        distributed._spawn(print, launcher(), "auto")


def wait_for_signal(rank: int, signals: set[signal.Signals]) -> None:
    signal.sigwait(signals)


def test_a_signal_is_reported_although_all_processes_exit_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> ProcessContext:
        # The signal is blocked in the children from their start, until they wait for it.
        blocked = {signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        children = start_processes(wait_for_signal, (blocked,), 2, join=False, start_method="fork")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        os.kill(os.getpid(), signal.SIGTERM)
        return children

    monkeypatch.setattr(distributed, "start_processes", start)
    with handlers_kept():
        assert distributed._spawn(print, launcher(), "auto") == 128 + signal.SIGTERM


def test_processes_without_a_gpu_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that monkeypatch restores it
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "cores", lambda: 7)
    monkeypatch.setattr(distributed, "start_processes", lambda *_, **__: ProcessContext([], []))
    with handlers_kept():
        assert distributed._spawn(print, launcher(), "auto") == 0
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_nothing_refers_to_the_process_group_after_the_end(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    model.itself = model  # as in a trainer with hooks that refer to it
    assert comm._get_global_gloo_group() is group() is model.process_group
    del model
    distributed.leave_process_group()
    assert group() is None


@contextmanager
def handlers_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_damaged_data_of_one_process_are_one_sentence(root: Path, tmp_path: Path) -> None:
    arguments = command("train_net.py", tmp_path, "DATASETS.SKIP_UNREADABLE", "False", flags=TWO)
    image = root / "svhn/train/3.png"
    content = image.read_bytes()
    image.write_bytes(content[:-400])
    try:
        assert "train/3.png" in fails(root, *arguments)
    finally:
        image.write_bytes(content)


@pytest.mark.slow
def test_the_number_of_processes_may_change_on_resumption_with_a_warning(root: Path, tmp_path: Path) -> None:
    arguments = ("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 2)
    run(root, *command("pretrain_ssl.py", tmp_path, *arguments), status=-signal.SIGKILL, fault="step:5")
    done = run(root, *command("pretrain_ssl.py", tmp_path, *arguments, flags=("--resume", *TWO)))
    assert "continues with 2 processes instead of 1" in done.stdout
    rows = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert rows == list(range(8))


@pytest.mark.slow
def test_two_machines(root: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    flags = ("--num-machines", 2, "--num-gpus", 1, "--dist-url", url, "--machine-rank")
    arguments = ("SOLVER.MAX_ITER", 3)
    second = command("pretrain_ssl.py", tmp_path, *arguments, flags=(*flags, 1))
    with started(root, *second) as process:
        run(root, *command("pretrain_ssl.py", tmp_path, *arguments, flags=(*flags, 0)))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (tmp_path / "encoder.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-machines", 2), "needs --dist-url"),
        (("--num-machines", 2, "--num-gpus", 0), "give 1 or more of both"),
        (("--machine-rank", 1), "give 0 to 0"),
        (("--num-gpus", 2, "--dist-url", "tcp://no.such.machine.invalid:1"), "is not an address"),
    ],
)
def test_invalid_numbers_of_processes_are_rejected(
    flags: tuple[object, ...], message: str, root: Path, tmp_path: Path
) -> None:
    assert message in fails(root, *command("train_net.py", tmp_path, flags=flags))
