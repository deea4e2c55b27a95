"""Classification from the command line: real images, resuming, two processes, invalid input."""

import itertools
import json
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.classifiers import SMALL, config, trained
from tests.support.runs import equal, rows
from tests.support.scripts import fails, run


def command(trees: Path, output: Path, *more: object, flags: tuple[object, ...] = ()) -> tuple[object, ...]:
    """A short run on the red and blue images."""
    data = {"DATASETS.TRAIN": f"('{trees}/train',)", "DATASETS.TEST": f"('{trees}/test',)", "OUTPUT_DIR": output}
    given = [part for pair in (SMALL | data).items() for part in pair]
    return ("train_cls.py", "--config-file", "configs/cls/cifar10_vit_s4.yaml", *flags, *given, *more)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
def few(samples: Path, tmp_path: Path) -> Path:
    """A data root with the first two classes of the sample archive of CIFAR-10."""
    root = tmp_path / "data"
    root.mkdir()
    with (
        tarfile.open(samples / "cifar10_jpg.tar.gz", "r|gz") as whole,
        tarfile.open(root / "cifar10_jpg.tar.gz", "w:gz") as part,
    ):
        for member in itertools.islice(whole, 1100):
            if member.isfile() and int(Path(member.name).stem) < 20:
                part.addfile(member, whole.extractfile(member))
    return root


def test_pretraining_and_fine_tuning_on_images_in_an_archive(few: Path, tmp_path: Path) -> None:
    tiny = ("MODEL.ENCODER.NAME", "vit_nano", "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 1)
    images = ("DATASETS.TRAIN", "('cifar10_test[:40]',)", "DATASETS.TEST", "('cifar10_test[:20]',)")
    ssl, cls = (("--config-file", f"configs/{part}/cifar10_vit_s4.yaml", *tiny, *images) for part in ("ssl", "cls"))
    run(few, "pretrain_ssl.py", *ssl, "OUTPUT_DIR", tmp_path / "ssl")
    weights = ("MODEL.WEIGHTS", tmp_path / "ssl/encoder.safetensors", "OUTPUT_DIR", tmp_path / "cls")
    done = run(few, "train_cls.py", *cls, *weights, "TEST.EVAL_PERIOD", 1)
    for line in (
        "100.0% of the encoder's values matched",
        "fresh         1: vit.pos_embed",
        "and the loaded encoder agree to 0.0e+00",
    ):
        assert line in done.stdout, line
    results = read(tmp_path / "cls/inference/results.json")["cifar10_test[:20]"]
    assert results["images"] == 20 and "5.9 gray levels" in results["note"] and 0 <= results["test"]["top1"] <= 100


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(trees: Path, tmp_path: Path) -> None:
    """With everything random or stateful: RandAugment, mixup, cutmix, joint losses, the average of the weights."""
    mix = ("INPUT.VIEW.RANDAUGMENT", 2, "INPUT.VIEW.MIXUP", 0.2, "INPUT.VIEW.CUTMIX", 1.0, "SOLVER.EMA", 0.5)
    long = ("MODEL.RELVIT.JOINT", True, "SOLVER.MAX_ITER", 10, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 4)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(trees, *command(trees, straight, *mix, *long))
    run(trees, *command(trees, killed, *mix, *long), status=-signal.SIGKILL, fault="step:6")
    again = command(trees, killed, *mix, *long, flags=("--resume",))
    run(trees, *again, status=-signal.SIGKILL, fault="pointer:3")
    assert "resumed at iteration 8" in run(trees, *again).stdout
    one, other = (torch.load(output / "model_final.pth", weights_only=True) for output in (straight, killed))
    assert all(equal(one[key], other[key]) for key in ("model", "optimizer", "iteration"))
    assert any("average" in name for name in one["model"])
    assert rows(straight) == rows(killed) and len(rows(straight)) == 10
    assert read(straight / "inference/results.json") == read(killed / "inference/results.json")


@pytest.mark.slow
def test_two_processes_train_like_one(trees: Path, tmp_path: Path) -> None:
    plain = ("MODEL.ENCODER.DROP_PATH", 0.0)
    *_, alone = trained(config(trees, tmp_path / "one", *plain))
    run(trees, *command(trees, tmp_path / "two", *plain, flags=("--num-gpus", 2)))
    one, two = (torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"] for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    both = read(tmp_path / "two/inference/results.json")
    assert both[f"{trees}/test"]["test"]["loss"] == pytest.approx(alone[f"{trees}/test"]["test"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_probes_and_evaluation_again(trees: Path, tmp_path: Path) -> None:
    run(trees, *command(trees, tmp_path, "SOLVER.MAX_ITER", 20, "TEST.EVAL_PERIOD", 20))
    first = read(tmp_path / "inference/results.json")[f"{trees}/test"]["test"]
    for flags, name in ((("--eval", "linear"), "linear"), (("--eval", "knn"), "knn"), (("--eval-only",), "test")):
        run(trees, *command(trees, tmp_path, flags=(*flags, "--resume")))
        file = "results.json" if name == "test" else f"{name}.json"
        found = read(tmp_path / "inference" / file)[f"{trees}/test"]
        assert found[name]["top1"] > 90 and found["images"] == 12
    assert found["test"] == first


def test_a_damaged_archive_is_reported_in_one_sentence(trees: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.tar.gz").write_bytes(b"\x1f\x8b\x08")
    given = ("DATASETS.TRAIN", f"('{tmp_path}/bad.tar.gz/train',)")
    assert "bad.tar.gz' is damaged or not an archive" in fails(trees, *command(trees, tmp_path / "out", *given))
