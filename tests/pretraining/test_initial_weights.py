"""Pre-training that starts from weights: what it loads, and its learning rates."""

import re
import signal
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from timm.optim import param_groups_layer_decay

from relvit_d2.conversion.encoder_file import read_encoder, save_encoder
from relvit_d2.encoders import build_encoder
from relvit_d2.engine.optimizer import build_optimizer
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import load_config
from tests.support.detectron2_models import detectron2_model, encoder_keys
from tests.support.runs import equal, rows
from tests.support.scripts import command, fails, run

DEMO = "configs/demo/ssl_streets.yaml"
WEIGHTS = ("MODEL.WEIGHTS", "encoder.safetensors")


def config(path: object = DEMO, *overrides: object) -> CfgNode:
    return load_config(str(path), [str(part) for part in ("MODEL.DEVICE", "cpu", *overrides)], "pretrain")


def rates(cfg: CfgNode) -> tuple[float, float]:
    return cfg.SOLVER.BASE_LR, cfg.SOLVER.LAYER_DECAY


def expected_factor(name: str, parameter: torch.nn.Parameter, timms: dict[int, float]) -> float:
    """Return the factor of the rate of a parameter of an encoder.

    timm's are those without heads; its final norm belongs to the last block, here, as in MAE and BEiT, to the heads.
    """
    if re.fullmatch(r"(\w+\.)?norm\.(weight|bias)", name):
        return 1.0
    if timms:
        return 0.75 * timms[id(parameter)]
    block = re.match(r"blocks\.(\d+)\.", name)  # T2T-ViT-14, which timm does not have
    return 0.75 ** (14 - int(block[1]) if block else 15)


@pytest.mark.parametrize(
    ("path", "name"),
    [(DEMO, "vit"), ("configs/ssl/voc_swin_t.yaml", "swin"), ("configs/ssl/voc_t2t_vit_14.yaml", "t2t")],
)
def test_the_layers_have_the_rates_of_timms_layer_decay(path: str, name: str) -> None:
    scratch, cfg = config(path, "MODEL.WEIGHTS", ""), config(path, *WEIGHTS)
    assert rates(cfg) == (pytest.approx(scratch.SOLVER.BASE_LR / 5), 0.75) and scratch.SOLVER.LAYER_DECAY == 1
    model = build_pretraining_model(cfg)
    optimizer = build_optimizer(cfg, model)
    found = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    groups = [] if name == "t2t" else param_groups_layer_decay(getattr(model.encoder, name), layer_decay=0.75)
    timms = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for parameter_name, parameter in model.encoder.named_parameters():
        if parameter.requires_grad:
            expected = expected_factor(parameter_name, parameter, timms)
            assert found[id(parameter)] == pytest.approx(expected), parameter_name
    assert all(found[id(p)] == 1 for p in model.task.parameters())


def test_given_keys_win(tmp_path: Path) -> None:
    base, decay = rates(config(DEMO, *WEIGHTS))
    assert rates(config(DEMO, *WEIGHTS, "SOLVER.BASE_LR", 3e-3)) == (3e-3, decay)
    assert rates(config(DEMO, *WEIGHTS, "SOLVER.LAYER_DECAY", 1.0)) == (base, 1.0)
    file = tmp_path / "own.yaml"
    file.write_text(f"_BASE_: {Path(DEMO).resolve()}\nSOLVER:\n  BASE_LR: 0.002\n")
    assert rates(config(file, *WEIGHTS)) == (0.002, decay)
    assert rates(config(file)) == (0.002, 1.0)
    saved = tmp_path / "config.yaml"
    saved.write_text(config(DEMO, *WEIGHTS).dump())
    assert rates(config(saved)) == rates(config(saved, *WEIGHTS)) == (base, decay)


@pytest.mark.slow
def test_a_killed_run_from_weights_resumes_bitwise_identical(root: Path, tmp_path: Path) -> None:
    save_encoder(build_encoder("vit_nano", patch_size=4, img_size=32, pos_embed=False), tmp_path / "a.safetensors", {})
    keys = ("MODEL.WEIGHTS", tmp_path / "a.safetensors")
    run(root, *command("pretrain_ssl.py", tmp_path / "whole", *keys))
    killed = command("pretrain_ssl.py", tmp_path / "killed", *keys)
    run(root, *killed, status=-signal.SIGKILL, fault="step:5")
    saved = ("--config-file", tmp_path / "killed/config.yaml", "--resume")
    assert "resumed at iteration 3" in run(root, "pretrain_ssl.py", *saved).stdout
    one, other = (torch.load(tmp_path / f"{name}/model_final.pth", weights_only=True) for name in ("whole", "killed"))
    assert equal(one["model"], other["model"]) and equal(one["optimizer"], other["optimizer"])
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


def test_a_detector_of_detectron2_gives_its_encoder(root: Path, tmp_path: Path) -> None:
    theirs = detectron2_model(encoder_keys())
    torch.save({"model": theirs.state_dict()}, tmp_path / "vitdet.pth")
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    keys = [part for pair in encoder_keys().items() for part in pair]
    keys += ["SOLVER.BASE_LR", 0, "SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "PRETEXT.IMAGE_SIZE", 128]

    def pretrain(name: str, *more: object) -> tuple[object, ...]:
        return command("pretrain_ssl.py", tmp_path / "out", *keys, "MODEL.WEIGHTS", tmp_path / name, *more)

    assert "needs 1 other config keys (MODEL.ENCODER.GLOBAL_BLOCKS 2)" in fails(
        root, *pretrain("vitdet.pth", "MODEL.ENCODER.GLOBAL_BLOCKS", 1)
    )
    assert "is neither an encoder.safetensors nor" in fails(root, *pretrain("other.pth"))
    done = run(root, *pretrain("vitdet.pth"))
    assert re.search(r"left out +\d+: backbone\.simfp", done.stdout)
    assert "SOLVER.BASE_LR 0 and SOLVER.LAYER_DECAY 0.75 (default: 0.2 x SOLVER.BASE_LR" in done.stdout
    assert "learning rate factors from 0.237 " in done.stdout  # 0.75 ** 5
    tensors, _ = read_encoder(tmp_path / "out/encoder.safetensors")
    expected = theirs.state_dict()
    assert {n for n in tensors if n.endswith("weight")} and len(tensors) == sum("backbone.net." in n for n in expected)
    for name, value in tensors.items():
        if name != "vit.pos_embed":
            torch.testing.assert_close(value, expected[name.replace("vit.", "backbone.net.", 1)], rtol=0, atol=0)
