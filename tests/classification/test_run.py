"""Classification from the command line: real images, resuming, two processes, invalid input."""

import itertools
import json
import signal
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from relvit_d2.classification.run import load_data
from relvit_d2.data.images.batches import TrainingBatches
from tests.support.classifiers import command, config, trained
from tests.support.labelled_folders import damage_trees
from tests.support.runs import equal, rows
from tests.support.scripts import fails, run


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
    mix: tuple[object, ...] = ("INPUT.VIEW.RANDAUGMENT", 2, "INPUT.VIEW.MIXUP", 0.2, "INPUT.VIEW.CUTMIX", 1.0)
    mix += ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5)
    long = ("MODEL.RELVIT.JOINT", True, "SOLVER.MAX_ITER", 10, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 4)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(trees, *command(trees, straight, *mix, *long))
    run(trees, *command(trees, killed, *mix, *long), status=-signal.SIGKILL, fault="step:6")
    again = command(trees, killed, *mix, *long, flags=("--resume",))
    run(trees, *again, status=-signal.SIGKILL, fault="pointer:3")
    assert "resumed at iteration 8" in run(trees, *again).stdout
    one, other = (torch.load(output / "model_final.pth", weights_only=True) for output in (straight, killed))
    assert all(equal(one[key], other[key]) for key in ("model", "optimizer", "ema", "iteration"))
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


def test_a_replaced_image_has_its_own_label(trees: Path, tmp_path: Path) -> None:
    damage_trees(trees, root := tmp_path / "trees")
    cfg = config(root, tmp_path / "out", "DATASETS.VALIDATION", "", "SOLVER.GRAD_ACCUM_STEPS", 2)
    data = load_data(cfg, training=True)
    assert data.train and data.test and len(data.train) == 23 and len(data.test) == 12
    batches = TrainingBatches(cfg, data.train.images, 0, data.train.labels)
    seen: Counter[int] = Counter()
    for batch in itertools.islice(batches, 24):  # four epochs
        red, _, blue = batch["images"].float().mean((2, 3)).unbind(1)
        assert torch.equal(batch["labels"], (red > blue).long())
        seen.update(batch["labels"].tolist())
    assert [Path(file).name for file in batches.replaced] == ["9.png"] and seen[1] > seen[0]


def test_unreadable_images_are_replaced_in_training_and_left_out_of_results(trees: Path, tmp_path: Path) -> None:
    bad = damage_trees(trees, root := tmp_path / "trees")
    output, clean = tmp_path / "out", tmp_path / "clean"
    keys = ("DATALOADER.NUM_WORKERS", 1, "TEST.BATCH_SIZE", 2, "DATASETS.VALIDATION", "")
    log = run(trees, *command(root, output, *keys)).stdout
    for line in (
        f"1 of 24 images cannot be read and are left out: {bad[0]}",
        f"1 training images could not be read and were replaced by the next ones: {bad[2]}",
        f"2 of 12 images of {root}/test cannot be read and are left out of the results",
    ):
        assert line in log, line
    found = read(output / "inference/results.json")[f"{root}/test"]
    assert (found.pop("unreadable_images"), found["images"]) == ({"images": 2}, 10)
    assert f"2 images of {root}/test cannot be read and are left out" in (output / "report.html").read_text()
    for kind, validation in (("knn", ""), ("linear", "25%")):
        flags = ("--eval", kind, "--resume")
        run(trees, *command(root, output, *keys, "DATASETS.VALIDATION", validation, flags=flags))
        assert read(output / f"inference/{kind}.json")[f"{root}/test"]["unreadable_images"] == {"images": 2}

    strict = (*keys, "DATASETS.SKIP_UNREADABLE", "False", "OUTPUT_DIR", clean)
    assert f"{bad[0]}' is not an image" in fails(trees, *command(root, clean, *strict))
    for image in bad:
        image.unlink()
    weights = ("MODEL.WEIGHTS", output / "model_final.pth")
    run(trees, *command(root, clean, *weights, flags=("--eval-only",)))
    expected = read(clean / "inference/results.json")[f"{root}/test"]
    assert found.pop("test") == pytest.approx(expected.pop("test"), rel=1e-5) and found == expected
