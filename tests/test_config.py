"""Configs: every file loads, faults are one sentence that names the key."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import get_cfg

from relvit_d2.config import _CHANGED, WITHOUT_EFFECT, add_relvit_config
from relvit_d2.encoders import ENCODERS
from relvit_d2.engine.config_file import load_config
from relvit_d2.errors import UserError

CONFIGS = sorted(str(path) for path in Path("configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads(path: str) -> None:
    cfg = load_config(path, ["SOLVER.MAX_ITER", "3"])
    assert cfg.SOLVER.MAX_ITER == 3
    assert cfg.MODEL.ENCODER.NAME in ENCODERS


@pytest.mark.parametrize("path", [path for path in CONFIGS if "voc" in path])
def test_the_arithmetic_in_a_header_is_that_of_the_schedule(path: str) -> None:
    found = re.search(r"= (\d+) \* (\d+) / (\d+) = (\d+) iterations", Path(path).read_text().replace(",", ""))
    assert found
    epochs, images, batch, iterations = map(int, found.groups())
    cfg = load_config(path, [])
    assert (batch, iterations) == (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER)
    assert abs(epochs * images / batch - iterations) < 5


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
