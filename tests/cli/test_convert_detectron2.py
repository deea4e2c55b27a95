"""The command convert --from detectron2, and training and prediction with the result."""

import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from relvit_d2.detection.predictor import load_detector
from relvit_d2.utils.files import write_text
from tests.support.detectron2_models import detectron2_model, encoder_keys, fields
from tests.support.runs import equal
from tests.support.scripts import command, fails, run

CLASSES = 80


@pytest.fixture(scope="module")
def theirs() -> Any:
    model: Any = detectron2_model(encoder_keys(), CLASSES)
    model.roi_heads.box_predictor.cls_score.weight.data.mul_(10)  # scores above the threshold
    return model


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of ``theirs`` as ``a.pth`` and ``a.pkl``."""
    folder = tmp_path_factory.mktemp("detectron2")
    torch.save({"model": theirs.state_dict()}, folder / "a.pth")
    arrays = {name: value.numpy() for name, value in theirs.state_dict().items()}
    (folder / "a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return folder


def test_the_converted_detector_predicts_and_trains(root: Path, theirs: Any, folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "vitdet/model_final.pth"
    done = run(
        root, "relvit-d2", "convert", folder / "a.pkl", "--from", "detectron2", "--allow-pickle", "--to", written
    )
    assert "80 classes, taken to be COCO's" in done.stdout and "agree with Detectron2's model" in done.stdout
    assert sorted(path.name for path in written.parent.iterdir()) == ["classes.json", "config.yaml", written.name]
    keys = ("MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TEST", 30, "SOLVER.PRECISION", "float32")
    detector = load_detector(written, overrides=keys, threshold=0.0)
    assert detector.class_names[:2] == ["person", "bicycle"]
    image = torch.randint(0, 256, (128, 100, 3), dtype=torch.uint8)
    with torch.no_grad():
        (expected,) = theirs([{"image": image.permute(2, 0, 1), "height": 128, "width": 100}])
    found, wanted = fields(detector(image.numpy())), fields(expected["instances"])
    assert len(found["scores"])
    for name in ("scores", "classes", "boxes"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-3)
    error = fails(root, "relvit-d2", "convert", folder / "a.pth", "--from", "detectron2", "--to", written)
    assert "config.yaml' exists: write 'model_final.pth' into a folder without a run" in error
    data = ("DATASETS.TRAIN", "('svhn_train',)", "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path / "out")
    short = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 0)
    done = run(root, "train_net.py", "--config-file", written.with_name("config.yaml"), *data, *short, *keys[:2])
    # Digits have other names than COCO's classes, and no masks.
    assert "new           4: roi_heads.box_predictor.bbox_pred, roi_heads.box_predictor.cls_score" in done.stdout
    assert (tmp_path / "out/model_final.pth").is_file()
    state = torch.load(tmp_path / "out/model_final.pth", weights_only=True)["model"]
    before, name = theirs.state_dict(), "net.blocks.1.attn.rel_pos_h"
    moved = (state[f"backbone.{name.replace('net', 'net.encoder.vit', 1)}"] - before[f"backbone.{name}"]).abs().max()
    assert 0 < moved < 0.01  # trained, from the value in the checkpoint


def test_invalid_files_are_reported_in_one_sentence(root: Path, folder: Path, tmp_path: Path) -> None:
    content = (folder / "a.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.pkl").write_bytes((folder / "a.pkl").read_bytes()[:5000])
    torch.save({"model": {"backbone.bottom_up.stem.conv1.weight": torch.zeros(1)}}, tmp_path / "resnet.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    write_text(tmp_path / "text.pkl", "anything")
    cases = {
        (
            "resnet.pth",
        ): "is neither a ViTDet nor an R-CNN on Swin of Detectron2 (first tensors: backbone.bottom_up.stem",
        ("cut.pth",): "is incomplete or damaged",
        ("cut.pkl", "--allow-pickle"): "is incomplete or damaged",
        ("cut.pkl",): "if you trust the source, add --allow-pickle",
        ("text.pkl", "--allow-pickle"): "is not a readable checkpoint",
        ("list.pth",): "is not a readable checkpoint",
        ("no.pth",): "no.pth' does not exist",
    }
    for (name, *flags), message in cases.items():
        target = ("--from", "detectron2", "--to", tmp_path / "out/a.pth")
        assert message in fails(root, "relvit-d2", "convert", tmp_path / name, *flags, *target)
    assert not (tmp_path / "out").exists()
    to = ("relvit-d2", "convert", folder / "a.pth", "--from", "detectron2", "--to")
    assert "does not end in .pth" in fails(root, *to, tmp_path / "a.txt")
    assert "cannot be created" in fails(root, *to, tmp_path / "cut.pth/a.pth")
    assert "add --from detectron2" in fails(
        root, "relvit-d2", "convert", folder / "a.pkl", "--allow-pickle", "--to", tmp_path / "a.safetensors"
    )
    for name, message in {
        "a.pkl": "set MODEL.ALLOW_PICKLE True",
        "a.pth": "relvit-d2 convert --from detectron2",
    }.items():
        error = fails(root, *command("train_net.py", tmp_path / "run", "MODEL.WEIGHTS", folder / name))
        assert message in error


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_fine_tuning_resumes_bitwise_identical(
    processes: int, root: Path, folder: Path, tmp_path: Path
) -> None:
    written = tmp_path / "vitdet/model_final.pth"
    run(root, "relvit-d2", "convert", folder / "a.pth", "--from", "detectron2", "--to", written)
    keys: list[object] = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2]
    keys += ["SOLVER.WARMUP_ITERS", 0, "MODEL.DEVICE", "cpu"]
    keys += ["DATASETS.TRAIN", "('svhn_train',)", "DATASETS.TEST", "()", "OUTPUT_DIR"]

    def train(output: Path, *flags: object, **how: Any) -> dict[str, Any]:
        config = ("--config-file", written.with_name("config.yaml"), "--num-gpus", processes)
        run(root, "train_net.py", *config, *flags, *keys, output, **how)
        name = (output / "last_checkpoint").read_text()
        return torch.load(output / name, weights_only=True)

    first = train(tmp_path / "one")
    killed = train(tmp_path / "other", fault="step:3", status=-signal.SIGKILL if processes == 1 else 1)
    assert killed["iteration"] == 1
    second = train(tmp_path / "other", "--resume")
    for key in ("model", "optimizer", "iteration"):
        assert equal(first[key], second[key]), key
