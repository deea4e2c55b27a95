"""Configs: every file loads, faults are one sentence that names the key."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import get_cfg

from relvit_d2.config import _CHANGED, WITHOUT_EFFECT, add_relvit_config
from relvit_d2.detection.backbone import SimplePyramid, build_encoder_pyramid_backbone
from relvit_d2.encoders import ENCODERS
from relvit_d2.engine.config_file import load_config
from relvit_d2.errors import UserError
from relvit_d2.pretraining.model import build_pretraining_model

CONFIGS = sorted(str(path) for path in Path("configs").rglob("*.yaml"))
ROWS = [path for path in CONFIGS if "base/" not in path and "demo/" not in path]


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads(path: str) -> None:
    cfg = load_config(path, ["SOLVER.MAX_ITER", "3"])
    assert cfg.SOLVER.MAX_ITER == 3
    assert cfg.MODEL.ENCODER.NAME in ENCODERS


@pytest.mark.parametrize("path", [path for path in ROWS if "MAX_ITER" in Path(path).read_text()])
def test_the_arithmetic_in_a_header_is_that_of_the_schedule(path: str) -> None:
    found = re.search(r"= (\d+) \* (\d+) / (\d+) = (\d+) iterations", Path(path).read_text().replace(",", ""))
    assert found
    epochs, images, batch, iterations = map(int, found.groups())
    cfg = load_config(path, [])
    assert (batch, iterations) == (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER)
    assert abs(epochs * images / batch - iterations) < 5


@pytest.mark.parametrize("path", ROWS)
def test_a_header_gives_row_commands_and_cost_and_the_commands_fit_together(path: str) -> None:
    header = Path(path).read_text()
    # Variants of a pre-training have no row of their own.
    assert re.search("Table [123]", header) or ("/ssl/" in path and re.search("_BASE_: [a-z]", header))
    assert re.search(r"^# Cost: .+", header, re.MULTILINE)
    commands = re.findall(r"python (\w+\.py) --config-file (\S+)", header)
    script = {"configs/ssl": "pretrain_ssl.py", "configs/cls": "train_cls.py", "configs": "train_net.py"}
    assert (script[str(Path(path).parent)], path) in commands
    for script, file in commands:
        assert load_config(file, [], script)
    weights = load_config(path, []).MODEL.WEIGHTS
    before = [load_config(file, []).OUTPUT_DIR for script, file in commands if script == "pretrain_ssl.py"]
    if "/ssl/" not in path:
        assert [f"{folder}/encoder.safetensors" for folder in before] == [weights] * bool(weights)


@pytest.mark.parametrize("path", [path for path in CONFIGS if "base/" not in path])
def test_digits_are_not_mirrored_and_anchors_fit_the_levels(path: str) -> None:
    cfg = load_config(path, [])
    if cfg.DATASETS.TRAIN[0].startswith(("svhn", "streets")):
        view = cfg.INPUT.VIEW.FLIP == 0 if "/cls/" in path else cfg.INPUT.RANDOM_FLIP == "none"
        assert cfg.PRETEXT.FLIP == 0 if "ssl" in path else view
    if "ssl" not in path and "/cls/" not in path:
        assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(cfg.MODEL.RPN.IN_FEATURES)


@pytest.mark.parametrize("path", [path for path in ROWS if "ssl/" not in path and "cls/" not in path])
def test_a_header_names_the_pyramid_and_why(path: str) -> None:
    """The pyramid that the config builds, and beside the paper's FPN the key that is nearer to it."""
    cfg, header = load_config(path, []), " ".join(Path(path).read_text().replace("\n# ", " ").split())
    pyramid = built_pyramid(cfg.MODEL.ENCODER.NAME, cfg.MODEL.ENCODER.PATCH_SIZE, cfg.MODEL.PYRAMID.NAME)
    assert f"Pyramid: {'simple' if pyramid is SimplePyramid else 'FPN'}" in header and 'paper writes "FPN"' in header
    assert ("MODEL.PYRAMID.NAME multitap" in header) == (pyramid is SimplePyramid)


@pytest.mark.parametrize("path", ROWS)
def test_a_header_states_how_the_authors_data_and_choice_of_the_model_differ(path: str) -> None:
    header, stem = " ".join(Path(path).read_text().replace("\n# ", " ").split()), Path(path).stem
    assert ("minival that later became val2017 (from memory)" in header) == stem.startswith("coco_")
    assert ("Kaggle set ambityga/imagenet100" in header) == stem.startswith("imagenet100_")
    assert ("the least validation loss" in header) == ("/ssl/" in path)
    if "/cls/" in path and not stem.endswith(("_supervised", "_joint")):
        assert "The authors" in header and "TEST.BEST_ON_TEST True" in header


@functools.cache
def built_pyramid(encoder: str, patch: int, pyramid: str) -> type:
    keys = ["MODEL.ENCODER.NAME", encoder, "MODEL.ENCODER.PATCH_SIZE", str(patch), "MODEL.PYRAMID.NAME", pyramid]
    return type(build_encoder_pyramid_backbone(load_config("configs/base/detection.yaml", keys), None))


def test_no_two_runs_share_a_folder() -> None:
    folders = [load_config(path, []).OUTPUT_DIR for path in CONFIGS if "base/" not in path]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", [path for path in ROWS if "/ssl/" in path])
def test_the_stated_chance_is_that_of_the_model(path: str) -> None:
    found = re.search(r"on an? (\d+) x (\d+) grid: relation ([\d.]+) %, position ([\d.]+) %", Path(path).read_text())
    assert found
    task = build_pretraining_model(load_config(path, ["MODEL.DEVICE", "cpu"])).task
    assert task.grid == (int(found[1]), int(found[2]))
    told = {"relation": float(found[3]) / 100, "position": float(found[4]) / 100}
    assert task.chance() == pytest.approx(told, abs=6e-4)


def test_our_keys_leave_detectron2s_as_they_are_but_for_the_named_ones() -> None:
    stock, ours = get_cfg(), get_cfg()
    add_relvit_config(ours)

    def keys(node: dict[str, object], prefix: str = "") -> set[str]:
        found = set()
        for name, value in node.items():
            found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
        return found

    assert keys(stock) < keys(ours)
    changed = {key for key in keys(stock) if value(stock, key) != value(ours, key)}
    assert changed <= {*_CHANGED, "MODEL.DEVICE"}


def value(node: Any, key: str) -> Any:
    return functools.reduce(lambda inner, part: inner[part], key.split("."), node)


def test_keys_without_effect_are_refused_and_exist() -> None:
    stock = get_cfg()
    for key in WITHOUT_EFFECT:
        value(stock, key)
    with pytest.raises(UserError, match=r"SOLVER.AMP.ENABLED has no effect here; .* SOLVER.PRECISION"):
        load_config("configs/demo/streets.yaml", ["SOLVER.AMP.ENABLED", "True"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["SOLVER.BASE_RL", "1"], r"unknown config key 'SOLVER.BASE_RL'; did you mean 'SOLVER.BASE_LR'"),
        (["MODEL.ENCODER.PATCHSIZE", "8"], r"did you mean 'MODEL.ENCODER.PATCH_SIZE'"),
        (["SOLVER.MAX_ITER", "many"], r"SOLVER.MAX_ITER.*int.*many"),
        (["SOLVER.MAX_ITER"], "KEY VALUE pairs"),
    ],
)
def test_bad_overrides(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config("configs/demo/streets.yaml", overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "VERSION: 2\nSOLVER:\n  MAX_ITTER: 3\n",
            r"unknown config key 'SOLVER.MAX_ITTER'; did you mean 'SOLVER.MAX_ITER'",
        ),
        ("VERSION: 2\nSOLVER:\n  MAX_ITER: soon\n", r"SOLVER.MAX_ITER.*int.*soon"),
        ("VERSION: 2\nSOLVER: [\n", "not valid yaml"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml"),
        ("just words\n", "bad.yaml"),
    ],
)
def test_bad_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(str(path), [])


def test_an_absent_file_is_named() -> None:
    with pytest.raises(UserError, match=r"'configs/voc_vit_x.yaml' does not exist"):
        load_config("configs/voc_vit_x.yaml", [])
