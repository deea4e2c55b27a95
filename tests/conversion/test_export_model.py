"""Exported backbones agree with the original ones, at sizes that the command does not compare."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from relvit_d2.cli import export_model
from relvit_d2.detection import backbone as backbones
from relvit_d2.detection import export
from relvit_d2.detection.backbone import build_encoder_pyramid_backbone
from relvit_d2.encoders import build_encoder
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.scripts import fails

CONFIG = "configs/demo/streets.yaml"
NARROW = ["MODEL.PYRAMID.OUT_CHANNELS", "32"]


def arguments(output: Path, to: str, *opts: str, size: list[int] | None = None) -> argparse.Namespace:
    return argparse.Namespace(config_file=CONFIG, weights="", to=to, output=output, size=size, opts=[*NARROW, *opts])


def loaded(path: Path, to: str) -> Callable[[Tensor], dict[str, Tensor]]:
    if to == "torch-export":
        loaded_program = torch.export.load(path).module()
        return lambda images: loaded_program(images)
    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]

    def program(images: Tensor) -> dict[str, Tensor]:
        levels = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(np.asarray(level)) for name, level in zip(names, levels, strict=True)}

    return program


def check(path: Path, to: str, sizes: list[tuple[int, ...]], opts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Export weights of a known seed and compare with a model of the same seed."""

    def build(*args: object) -> nn.Module:
        torch.manual_seed(3)
        return build_encoder_pyramid_backbone(*args)

    monkeypatch.setattr(export, "build_encoder_pyramid_backbone", build)
    static = sizes[0][2:] if len(sizes) == 1 else None
    export_model.run(arguments(path, to, *opts, size=list(static) if static else None))
    model, program = build(load_config(CONFIG, [*NARROW, *opts]), None).eval(), loaded(path, to)
    for size in sizes:
        images = torch.randn(size)
        with torch.no_grad():
            expected = model(images)
        found = program(images)
        assert list(found) == list(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["torch-export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_vit_is_exported_for_any_size(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path / "backbone", to, [(1, 3, 56, 24), (4, 3, 16, 96)], [], monkeypatch)
    assert [file.name for file in tmp_path.iterdir()] == ["backbone"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch-export", "onnx"])
def test_a_windowed_vit_is_exported_for_any_size_above_its_window(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = ["MODEL.ENCODER.WINDOW", "3", "MODEL.ENCODER.GLOBAL_BLOCKS", "2"]
    check(tmp_path / "backbone", to, [(1, 3, 56, 24), (4, 3, 16, 96)], opts, monkeypatch)


FULL = ["MODEL.PYRAMID.STRIDES", "[4,8,16,32]", "MODEL.RPN.IN_FEATURES", "['p2','p3','p4','p5']"]
FULL += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch-export", "onnx"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("swin_tiny", [(1, 3, 96, 160)]), ("t2t_vit_14", [(1, 3, 160, 224), (1, 3, 64, 96)])],
)
def test_the_other_encoders_are_exported(
    name: str, sizes: list[tuple[int, ...]], to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = build_encoder(name).arguments["patch_size"]
    opts = ["MODEL.ENCODER.NAME", name, "MODEL.ENCODER.PATCH_SIZE", str(patch), *FULL]
    check(tmp_path / "backbone", to, sizes, opts, monkeypatch)


def test_a_program_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differs from the model"):
        export_model.run(arguments(tmp_path / "backbone", "torch-export"))
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"folder .*absent.* does not exist"):
        export_model.run(arguments(tmp_path / "absent/file", "torch-export"))
    with pytest.raises(UserError, match=r"--size is for Swin only"):
        export_model.run(arguments(tmp_path / "file", "torch-export", size=[64, 64]))
    swin = ["MODEL.ENCODER.NAME", "swin_tiny", "MODEL.ENCODER.PATCH_SIZE", "4", *FULL]
    with pytest.raises(UserError, match=r"--size 100 64: give multiples of 32"):
        export_model.run(arguments(tmp_path / "file", "torch-export", *swin, size=[100, 64]))
    monkeypatch.setattr(export_model, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package onnx: run pip install"):
        export_model.run(arguments(tmp_path / "file", "onnx"))


def test_missing_weights_are_reported(root: Path) -> None:
    where = ("--config-file", CONFIG, "--to", "onnx", "--output", root / "x.onnx")
    assert "'absent.pth' does not exist" in fails(root, "relvit-d2", "export-model", "--weights", "absent.pth", *where)


def test_the_subsampled_level_equals_max_pooling_with_stride_2() -> None:
    maps = torch.randn(2, 3, 7, 4)
    (found,) = backbones.SubsampledLevel("p5")(maps)
    assert torch.equal(found, nn.functional.max_pool2d(maps, kernel_size=1, stride=2))
