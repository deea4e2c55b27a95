"""The scripts in subprocesses: files, output and exit statuses."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.support.scripts import command, fails, run

pretrain, detect = partial(command, "pretrain_ssl.py"), partial(command, "train_net.py")


@pytest.fixture(scope="module")
def encoder(root: Path) -> Path:
    run(root, *pretrain(root / "ssl"))
    return root / "ssl/encoder.safetensors"


def test_files_of_pretraining(root: Path, encoder: Path) -> None:
    output = encoder.parent
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(6))  # the last one has the held-out metrics too
    for task, chance in (("relation", 7 * 7 / 256), ("position", 1 / 64)):
        assert rows[0][f"chance_{task}"] == pytest.approx(chance)
        assert 0 <= rows[5][f"accuracy_{task}"] <= 1
        assert 0 <= rows[-1][f"held_out/accuracy_{task}"] <= 1
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert {"model", "optimizer", "iteration"} <= torch.load(output / "model_final.pth", weights_only=True).keys()
    assert list(output.glob("events.out.tfevents.*"))
    assert (output / "config.yaml").is_file()
    with safe_open(str(encoder), "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    assert metadata["encoder"]["name"] == "vit_nano"
    assert metadata["iteration"] == 6
    assert metadata["patch"] == 4
    assert metadata["image_size"] == 32
    assert {"pixel_mean", "pixel_std", "pretext", "version"} <= metadata.keys()
    log = (output / "log.txt").read_text()
    assert "(chance 19.1%)" in log
    assert "eta" not in log.splitlines()[-1]


def test_a_resumed_pretraining_equals_an_uninterrupted_one(root: Path, encoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "ssl"
    run(root, *pretrain(output), "SOLVER.CHECKPOINT_PERIOD", 4)
    # The state after a kill in iteration 5: the checkpoint of iteration 3 and metrics after it.
    (output / "model_final.pth").unlink()
    (output / "encoder.safetensors").write_bytes(b"damaged")
    (output / "last_checkpoint").write_text("model_0000003.pth")
    done = run(root, *pretrain(output, "DATALOADER.NUM_WORKERS", 1, flags=("--resume",)))
    assert "resumed at iteration 4" in done.stdout
    straight, resumed = (torch.load(p / "model_final.pth", weights_only=True) for p in (encoder.parent, output))
    assert all(torch.equal(straight["model"][name], resumed["model"][name]) for name in straight["model"])
    assert (output / "encoder.safetensors").read_bytes() == encoder.read_bytes()


# Keep detections of any score, so that there are some after a few iterations.
EVERYTHING = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)


def detections(output: Path) -> list[dict[str, Any]]:
    found = json.loads((output / "inference/coco_instances_results.json").read_text())
    return sorted(found, key=lambda d: (d["image_id"], d["category_id"], -d["score"], d["bbox"]))


def test_detection_from_the_encoder_then_evaluation_again(root: Path, encoder: Path, tmp_path: Path) -> None:
    done = run(root, *detect(tmp_path, "MODEL.WEIGHTS", encoder))
    for line in (
        "100.0% of the encoder's values matched",
        "loaded",
        "fresh         1: vit.pos_embed",
        "features of the pre-trained and the loaded encoder agree",
    ):
        assert line in done.stdout, line
    first = json.loads((tmp_path / "inference/results.json").read_text())["svhn_test"]["bbox"]
    assert {"AP", "AP50", "AP75"} <= first.keys()
    config = (tmp_path / "config.yaml").read_text()
    run(root, *detect(tmp_path, *EVERYTHING, flags=("--eval-only", "--resume")))
    assert (tmp_path / "config.yaml").read_text() == config
    weights = ("MODEL.WEIGHTS", tmp_path / "model_final.pth", *EVERYTHING)
    run(root, *detect(tmp_path / "two", *weights, flags=("--eval-only", "--num-gpus", "2")))
    alone, two = detections(tmp_path), detections(tmp_path / "two")
    assert {d["image_id"] for d in alone} == set("12345")  # an odd number, which two processes cannot share evenly
    assert alone == two
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert "bbox/AP50" in rows[-1]


def test_data_without_masks_turn_the_mask_head_off_with_a_note(root: Path, tmp_path: Path) -> None:
    done = run(root, *detect(tmp_path, "MODEL.MASK_ON", "True", "SOLVER.MAX_ITER", 1))
    assert done.stdout.count("the mask head is off") == 1
    assert not any("mask" in name for name in torch.load(tmp_path / "model_final.pth", weights_only=True)["model"])


def test_masks_are_trained_and_evaluated_if_the_data_have_them(samples: Path, tmp_path: Path) -> None:
    names = ["DATASETS.TRAIN", "('coco_2017_train[:4]',)", "DATASETS.TEST", "('coco_2017_val[:2]',)"]
    small = ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16]
    done = run(samples, *detect(tmp_path, *names, *small, *EVERYTHING, "SOLVER.MAX_ITER", 1))
    assert "the mask head is off" not in done.stdout
    results = json.loads((tmp_path / "inference/results.json").read_text())["coco_2017_val[:2]"]
    assert {"AP", "AP50", "AP75"} <= results["bbox"].keys() & results["segm"].keys()
    assert "loss_mask" in json.loads((tmp_path / "metrics.json").read_text().splitlines()[0])


def test_pretraining_on_a_folder_of_images(root: Path, tmp_path: Path) -> None:
    (tmp_path / "images/deep").mkdir(parents=True)
    for number, size in enumerate([(40, 30), (64, 64), (33, 90)]):
        Image.effect_noise(size, 60).save(tmp_path / f"images/deep/{number}.png")
    names = ("DATASETS.TRAIN", f"('{tmp_path}/images',)", "DATASETS.TEST", "()")
    run(root, *pretrain(tmp_path / "out", *names, "SOLVER.MAX_ITER", 2))
    assert (tmp_path / "out/encoder.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_train_both_stages(root: Path, tmp_path: Path) -> None:
    run(root, *pretrain(tmp_path / "ssl", "SOLVER.MAX_ITER", 2, flags=("--num-gpus", 2)))
    encoder = tmp_path / "ssl/encoder.safetensors"
    with safe_open(str(encoder), "pt") as file:
        assert "accuracy_relation" in json.loads(file.metadata()["results"])["held_out"]
    run(root, *detect(tmp_path / "detector", "MODEL.WEIGHTS", encoder, flags=("--num-gpus", "2")))
    rows = [json.loads(line) for line in (tmp_path / "detector/metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(4))
    assert (tmp_path / "detector/model_final.pth").is_file()


def test_damaged_voc_files_are_reported(samples: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(samples / "VOC2007", data / "VOC2007")
    ids = (data / "VOC2007/ImageSets/Main/train.txt").read_text().split()[:2]
    image, xml = data / f"VOC2007/JPEGImages/{ids[0]}.jpg", data / f"VOC2007/Annotations/{ids[1]}.xml"
    names = ["DATASETS.TRAIN", "('voc_2007_train[:2]',)", "DATASETS.TEST", "()", "MODEL.PYRAMID.OUT_CHANNELS", "16"]
    whole = xml.read_text()
    for bad in ("<xmin>99999</xmin>", "<xmin>-40</xmin>"):
        xml.write_text(re.sub(r"<xmin>.*?</xmin>", bad, whole))
        assert xml.name in fails(data, *detect(tmp_path / "out", *names))
    xml.write_text(whole)
    image.write_bytes(image.read_bytes()[:3000])
    assert image.name in fails(data, *detect(tmp_path / "out", *names, "DATASETS.SKIP_UNREADABLE", "False"))
    assert f"replaced by the next ones: {image}" in run(data, *detect(tmp_path / "out2", *names)).stdout


def test_evaluation_of_pretraining_needs_its_heads(root: Path, encoder: Path, tmp_path: Path) -> None:
    script = pretrain(tmp_path, "MODEL.WEIGHTS", flags=("--eval-only",))
    assert "model_final.pth" in fails(root, *script, encoder)
    run(root, *script, encoder.parent / "model_final.pth")
    again = json.loads((tmp_path / "inference/results.json").read_text())["held_out"]
    assert again == json.loads((encoder.parent / "inference/results.json").read_text())["held_out"]


@pytest.mark.slow
def test_the_detector_overfits_eight_real_images(samples: Path) -> None:
    config = ("--config-file", "configs/paper/voc_vit_s_224.yaml", "--images", 8)
    assert "passed" in run(samples, "relvit-d2", "overfit-check", *config).stdout


def test_debug_shows_the_traceback(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELVIT_DEBUG", "1")
    assert "Traceback" in run(root, *detect(tmp_path, "MODEL.ENCODER.NAME", "vit_huge"), status=1).stderr
