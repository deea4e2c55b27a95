"""Pre-training: permutation, mega-patches, metrics, warnings, and its visualisation."""

import argparse
import json
import logging
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

import relvit_d2.pretraining.run as pretraining
from relvit_d2.data.classification.datasets import get_class_set
from relvit_d2.data.images.batches import ImageStack
from relvit_d2.engine.checkpoint import Checkpointer
from relvit_d2.pretraining.model import PretrainingModel, build_pretraining_model
from relvit_d2.pretraining.run import image_files, next_command
from relvit_d2.report.pretext import assign, draw_pretext, pretext_rows, sheet_of_run
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import as_scalars
from relvit_d2.utils.randomness import seed_everything
from tests.support.labelled_folders import damage_trees
from tests.support.scripts import command, fails, run


def config(*overrides: object) -> CfgNode:
    tiny = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", 4, "SOLVER.REFERENCE_BATCH", 0, "SOLVER.WARMUP_ITERS", 1]
    pairs = [str(part) for part in (*tiny, "DATASETS.TRAIN", "('svhn_train',)", "DATASETS.TEST", "()", *overrides)]
    return load_config("configs/demo/ssl_streets.yaml", pairs, "pretrain")


def model_of(*overrides: object) -> PretrainingModel:
    cfg = config(*overrides)
    seed_everything(0, "model")
    return build_pretraining_model(cfg)


@pytest.mark.parametrize(
    ("setting", "positions", "permuted"),
    [("auto", False, False), ("auto", True, True), ("always", False, True), ("never", True, False)],
)
def test_auto_permutes_if_the_encoder_has_position_information(
    setting: str, positions: bool, permuted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="relvit_d2"):
        model = model_of("PRETEXT.PERMUTE", setting, "MODEL.ENCODER.POS_EMBED", positions)
    assert model.views.config.permute == permuted
    assert ("PERMUTE" in caplog.text) == (setting == "auto")


def test_relative_positions_are_positions_and_the_losses_depend_on_the_permutation() -> None:
    keys = ("MODEL.ENCODER.POS_EMBED", False, "MODEL.ENCODER.REL_POS", True)
    assert model_of("PRETEXT.PERMUTE", "auto", *keys).views.config.permute
    images = torch.randint(0, 256, (2, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"images": images, "sizes": torch.tensor([[40, 40]] * 2), "keys": torch.arange(2)}
    losses = {}
    for permute in ("never", "always"):
        model = model_of("PRETEXT.PERMUTE", permute, *keys).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            losses[permute] = as_scalars(model(batch))
    names = [name for name in losses["never"] if name.startswith("loss")]
    assert names and all(abs(float(losses["never"][n]) - float(losses["always"][n])) > 1e-4 for n in names)


def test_losses_of_a_vit_without_position_embedding_ignore_the_permutation() -> None:
    """With a position embedding the losses differ."""
    images = torch.randint(0, 256, (3, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"images": images, "sizes": torch.tensor([[40, 40]] * 3), "keys": torch.arange(3)}

    def losses(permute: str, positions: bool) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        model = model_of("PRETEXT.PERMUTE", permute, "MODEL.ENCODER.POS_EMBED", positions).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # initial values hardly depend on positions
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            return as_scalars(model(batch))

    straight, moved = (losses(permute, positions=False) for permute in ("never", "always"))
    torch.testing.assert_close(moved, straight)
    straight, moved = (losses(permute, positions=True) for permute in ("never", "always"))
    assert not torch.isclose(moved["loss_position"], straight["loss_position"], rtol=1e-4)


def test_an_unknown_permutation_is_rejected() -> None:
    with pytest.raises(UserError, match="auto, always or never"):
        model_of("PRETEXT.PERMUTE", "sometimes")


def test_mega_patches_determine_the_grid_of_the_tasks() -> None:
    model = model_of("PRETEXT.MEGA.M", 5)
    assert model.task.grid == model.views.config.grid == (5, 5)
    kept = model_of("PRETEXT.MEGA.M", 5, "PRETEXT.MEGA.UNIT", 2, "PRETEXT.MEGA.KEEP_SIZE", True)
    assert kept.task.grid == (8, 8)
    with pytest.raises(UserError, match="choose 1 to 8"):
        model_of("PRETEXT.MEGA.M", 9)


def test_pooled_tokens_are_averages_on_half_the_grid() -> None:
    """The authors' AvgPool2d(3, stride 2, padding 1, count_include_pad=False), computed window by window."""
    model = model_of("PRETEXT.POOL", 2).eval()
    assert model.task.grid == (4, 4) and model.views.config.patch_size == 8
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, pooled = model.encoder(pixels)["s4"][0], model.tokens(pixels)[0]
    for n, (row, col) in enumerate((r, c) for r in range(0, 8, 2) for c in range(0, 8, 2)):
        window = whole[:, max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]
        torch.testing.assert_close(pooled[n], window.mean((1, 2)))
    with pytest.raises(UserError, match=r"PRETEXT\.POOL"):
        model_of("PRETEXT.POOL", 3)


def test_the_script_trains_and_logs_all_tasks_with_chance_levels(root: Path, tmp_path: Path) -> None:
    weights = [part for task in ("DISTANCE", "ANGLE", "BEARING") for part in (f"PRETEXT.WEIGHTS.{task}", 0.5)]
    more = ("PRETEXT.MEGA.M", 4, "PRETEXT.NOISE_PROB", 0.3, "PRETEXT.PAIR_DROPOUT", 0.2, "PRETEXT.PERMUTE", "always")
    for name in ("a", "b"):
        for i in range(4):
            (tmp_path / "labelled" / name).mkdir(parents=True, exist_ok=True)
            color = (250, 20 * i, 0) if name == "a" else (0, 20 * i, 250)
            Image.new("RGB", (40, 40), color).save(tmp_path / f"labelled/{name}/{i}.png")
    knn = ("PRETEXT.KNN", tmp_path / "labelled")
    done = run(root, *command("pretrain_ssl.py", tmp_path / "out", *weights, *more, *knn, "DATASETS.TEST", "()"))
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    for task in ("distance", "angle", "bearing"):
        assert rows[0][f"loss_{task}"] > 0 and rows[0][f"error_{task}"] > 0
        assert f"{task} error" in done.stdout
    assert rows[0]["chance_position"] == pytest.approx(1 / 16)
    figures = json.loads((tmp_path / "out/inference/results.json").read_text())["training_images"]
    assert figures["chance_knn"] == 0.5 and 0 <= figures["accuracy_knn"] <= 1
    assert 0 < figures["feature_std"] < 1 < figures["feature_rank"] < 128
    assert "training images: " in done.stdout and "effective rank" in done.stdout


def test_a_position_leak_is_warned_about_once(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The position embedding lets the position head ignore the patches."""
    leaky = ("MODEL.ENCODER.POS_EMBED", True, "PRETEXT.PERMUTE", "never", "PRETEXT.WEIGHTS.RELATION", 0.0)
    fast = ("SOLVER.MAX_ITER", 70, "SOLVER.BASE_LR", 3e-3, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.WARMUP_ITERS", 7)
    cfg = config("OUTPUT_DIR", tmp_path, *leaky, *fast)
    seed_everything(cfg.SEED, "model")
    model = build_pretraining_model(cfg)
    files = [*sorted((root / "svhn/train").glob("*.png"))] * 100
    with caplog.at_level(logging.WARNING, logger="relvit_d2"):
        pretraining.build_trainer(cfg, model, files, files[:2]).train()
    warnings = [record.message for record in caplog.records if "leak" in record.message]
    assert len(warnings) == 1 and "PRETEXT.PERMUTE" in warnings[0]


def test_no_warning_without_a_position_leak(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 25)
    files = [*sorted((root / "svhn/train").glob("*.png"))] * 20
    with caplog.at_level(logging.WARNING, logger="relvit_d2"):
        pretraining.build_trainer(cfg, build_pretraining_model(cfg), files, files[:2]).train()
    assert "leak" not in caplog.text


@pytest.mark.parametrize("folder", ["absent", "flat"])
def test_a_knn_folder_without_classes_is_rejected(folder: str, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    with pytest.raises(UserError, match=f"{folder}.*a folder of images for each class"):
        get_class_set(str(tmp_path / folder))


def test_unreadable_images_are_left_out_of_the_results(root: Path, trees: Path, tmp_path: Path) -> None:
    bad = damage_trees(trees, tmp_path / "trees")
    broken = tmp_path / "broken.png"  # with a header
    broken.write_bytes((root / "svhn/train/1.png").read_bytes()[:600])
    cfg = config("OUTPUT_DIR", tmp_path, "PRETEXT.KNN", tmp_path / "trees/train", "DATALOADER.NUM_WORKERS", 1)
    model = build_pretraining_model(cfg)
    files = [*sorted((root / "svhn/train").glob("*.png")), broken]
    found = pretraining.evaluate(cfg, model, files)
    results = json.loads((tmp_path / "inference/results.json").read_text())
    assert results["held_out"].pop("unreadable_images") == {"images": 1} and results == found
    for image in bad:
        image.unlink()
    expected = pretraining.evaluate(cfg, model, files[:-1])
    assert found["held_out"] == pytest.approx(expected["held_out"], rel=1e-5)
    assert json.loads((tmp_path / "inference/results.json").read_text()) == expected
    with pytest.raises(UserError, match="none of the 2 images of held out can be read"):
        pretraining.evaluate(cfg, model, [broken] * 2)
    strict = config("OUTPUT_DIR", tmp_path, "DATASETS.SKIP_UNREADABLE", False)
    with pytest.raises(UserError, match=r"broken.png' is damaged or truncated"):
        pretraining.evaluate(strict, model, files)


def test_joint_training_through_the_script(root: Path, tmp_path: Path) -> None:
    joint = ("MODEL.RELVIT.JOINT", True, "PRETEXT.WEIGHTS.DISTANCE", 1.0, "INPUT.LSJ.SIZE", 96)
    done = run(root, *command("train_net.py", tmp_path, *joint))
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    for name in ("loss_relation", "loss_position", "loss_distance", "loss_cls", "accuracy_relation", "error_distance"):
        assert name in rows[0]
    assert done.stdout.count("pretext tasks can be solved") == 1
    run(root, *command("train_net.py", tmp_path, *joint, flags=("--eval-only", "--resume")))


def test_visualisation_of_a_run(root: Path, tmp_path: Path) -> None:
    run(root, *command("pretrain_ssl.py", tmp_path / "run", "PRETEXT.PERMUTE", "always"))
    weights, images = tmp_path / "run/model_final.pth", root / "svhn/test"
    tool = ("relvit-d2", "visualize-pretext", "--images", images, "--output", tmp_path / "out.png", "--weights")
    done = run(root, *tool, weights, "--count", 2)
    assert "2 images" in done.stdout
    assert Image.open(tmp_path / "out.png").size > (1000, 400)
    assert "heads" in fails(root, *tool, tmp_path / "run/encoder.safetensors")
    assert "model_x.pth" in fails(root, *tool, tmp_path / "run/model_x.pth")


def test_rows_of_the_visualisation_have_the_true_layout(tmp_path: Path) -> None:
    """The layout restores the image from the view; the relations of the centre are the nine regions."""
    model = model_of("PRETEXT.PERMUTE", "always", "PRETEXT.CROP_SCALE", "[1.0,1.0]", "PRETEXT.PATCH_CROP", 1.0).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = pretext_rows(model, images, torch.tensor([[32, 32]] * 2), torch.tensor([1, 2]))
    for row in rows:
        assert row.truth[:4, :4].tolist() == [[0] * 4] * 4 and row.truth[4, 4] == 4 and (row.truth[5:, 5:] == 8).all()
        assert row.rebuilt is not None and row.answer is not None
        assert sorted(map(tuple, row.rebuilt.reshape(-1, 3))) == sorted(map(tuple, row.view.reshape(-1, 3)))
        assert 0 <= row.placed <= 1 and 0 <= row.right <= 1
    draw_pretext(rows, tmp_path / "rows.png", "two images")
    assert np.asarray(Image.open(tmp_path / "rows.png")).std() > 10
    with pytest.raises(ValueError, match="at least one"):
        draw_pretext([], tmp_path / "none.png", "nothing")


@pytest.mark.parametrize("kind", ["stack", "folder"])
def test_visualisation_of_a_run_of_another_machine(
    kind: str, trees: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained compiled on a GPU, on a folder or on a classification set in an archive."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name = f"{trees}/train"
    if kind == "stack":
        with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
            archive.add(trees / "train", "train")
        name = f"{tmp_path}/set.tar.gz/train"
    cfg = config("PRETEXT.IMAGE_SIZE", 32, "DATASETS.TRAIN", f"('{name}',)", "OUTPUT_DIR", tmp_path)
    assert isinstance(image_files("DATASETS.TRAIN", [name], False), ImageStack) == (kind == "stack")
    Checkpointer(build_pretraining_model(cfg), str(tmp_path)).save("model_final")
    cfg.MODEL.DEVICE, cfg.MODEL.COMPILE = "cuda", True
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert np.asarray(sheet_of_run(tmp_path, count=2)).std() > 10


def test_the_next_command_depends_on_the_kind_of_data(trees: Path) -> None:
    cifar, svhn, images = ("cifar10_train", "svhn_train", str(trees))
    for name, config_file, data, arguments in (
        (cifar, "configs/ssl/cifar10_vit_s4.yaml", None, "classify --config-file configs/cls/cifar10_vit_s4.yaml"),
        (svhn, "configs/ssl/svhn_vit_s.yaml", None, "train --config-file configs/svhn_vit_s.yaml"),
        (images, "configs/demo/ssl_streets.yaml", "my data", "train --config-file configs/demo/streets.yaml"),
        (images, str(trees / "mine.yaml"), None, "train --config-file FILE"),
    ):
        args = argparse.Namespace(config_file=config_file, data=data, opts=[])
        keys = ["DATASETS.TRAIN", f"('{name}',)"]
        where = " --data 'my data'" if data else ""
        expected = f"relvit-d2 {arguments}{where} MODEL.WEIGHTS out/encoder.safetensors"
        assert next_command(args, config(*keys), Path("out/encoder.safetensors")) == expected
        for output, following in (("my/pretrain", "my/finetune"), ("my", "my/finetune")):
            args.opts = [*keys, "OUTPUT_DIR", output]
            found = next_command(args, config(*args.opts), Path("out/encoder.safetensors"))
            assert found == f"{expected} OUTPUT_DIR {following}"


def test_every_pretraining_config_has_a_training_config_of_its_name() -> None:
    for path in Path("configs/ssl").glob("*.yaml"):
        cfg = load_config(str(path), [], "pretrain")
        args = argparse.Namespace(config_file=str(path), data=None, opts=[])
        assert "FILE" not in next_command(args, cfg, Path("encoder.safetensors"))


def test_assignment_is_one_to_one_and_greedy() -> None:
    scores = torch.tensor([[5.0, 4, 0], [6, 1, 0], [0, 0, -1]])
    assert assign(scores).tolist() == [1, 0, 2]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert assign(torch.eye(20)[order]).tolist() == order.tolist()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("script", ["pretrain_ssl.py", "train_net.py"])
def test_a_compiled_encoder_trains_as_the_eager_one(script: str, root: Path, tmp_path: Path) -> None:
    same = ("MODEL.ENCODER.DROP_PATH", 0.0, "SOLVER.MAX_ITER", 2, "MODEL.COMPILE")
    eager, compiled = ([*command(script, tmp_path / str(on), *same, on)] for on in (False, True))
    run(root, *eager), run(root, *compiled)
    rows = [json.loads((tmp_path / f"{on}/metrics.json").read_text().splitlines()[0]) for on in (False, True)]
    assert rows[1]["total_loss"] == pytest.approx(rows[0]["total_loss"], rel=1e-4)
