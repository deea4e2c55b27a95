"""Export of encoders to timm and Detectron2, and timm's pre-trained weights by name."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone import SwinTransformer
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.modeling.backbone.vit import ViT as Detectron2ViT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from relvit_d2.conversion.checkpoint_file import find_encoder
from relvit_d2.conversion.convert import convert
from relvit_d2.conversion.encoder_file import feature_difference, load_encoder_weights, read_encoder, save_encoder
from relvit_d2.conversion.export import to_detectron2, to_timm, verify_timm
from relvit_d2.encoders import Encoder, build_encoder
from relvit_d2.utils.errors import UserError
from tests.support.scripts import command, fails, run


def scattered(name: str, **arguments: Any) -> Encoder:
    """Build an encoder in which no parameter is 0 or 1."""
    torch.manual_seed(0)
    encoder = build_encoder(name, **arguments)
    for value in encoder.parameters():
        value.data.add_(0.1 * torch.randn_like(value))
    return encoder.eval()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_nano", {"patch_size": 8, "img_size": 32, "in_chans": 2}),
        ("vit_nano", {"patch_size": 8, "img_size": 32, "pos_embed": False}),
        ("timm:test_vit", {"img_size": 64}),
        ("timm:test_vit2", {"img_size": 64}),
        ("timm:test_vit3", {"img_size": 64}),
        ("timm:vit_tiny_patch16_dinov3_qkvb", {"img_size": 48, "pos_embed": False}),
        ("timm:eva02_tiny_patch14_224", {"img_size": 48, "in_chans": 2}),
        ("timm:eva02_tiny_patch14_224", {"img_size": 48, "pos_embed": False}),
        pytest.param("swin_tiny", {}, marks=pytest.mark.slow),
    ],
)
def test_timm_loads_the_tensors_strictly_and_they_convert_back(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    encoder = scattered(name, **arguments)
    model, made_with, tensors = to_timm(encoder)
    assert verify_timm(encoder, model, made_with, tensors) < 1e-5
    save_file(tensors, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": model}))
    back = convert(find_encoder(tmp_path / "model.safetensors")).encoder
    side = encoder.arguments["img_size"]
    image = torch.randn(1, encoder.arguments["in_chans"], side, side)
    with torch.no_grad():
        torch.testing.assert_close(back.tokens(image), encoder.tokens(image), rtol=1e-5, atol=1e-5)
    first = next(iter(tensors))
    with pytest.raises(UserError, match="nothing is written"):
        verify_timm(encoder, model, made_with, tensors | {first: tensors[first] * 2})


@pytest.mark.slow
def test_timm_loads_a_larger_swin() -> None:
    encoder = scattered("swin:small")
    assert verify_timm(encoder, *to_timm(encoder)) < 1e-4


def test_encoders_that_timm_lacks_are_refused() -> None:
    for name, arguments in {"vitdet:nano": {}, "vit_nano": {"rel_pos": True}}.items():
        with pytest.raises(UserError, match=f"has no model of encoder '{name}'"):
            to_timm(build_encoder(name, img_size=32, **arguments))


def test_detectron2s_vit_returns_the_patch_tokens_without_prefix_tokens(tmp_path: Path) -> None:
    exported = to_detectron2(scattered("vit_nano", patch_size=8, img_size=32))
    assert exported.difference < 1e-5
    assert "cls_token" in exported.unequal and "norm" in exported.unequal
    arguments = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "pretrain_img_size": 32}
    backbone = Detectron2ViT(**arguments, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    backbone.load_state_dict(exported.backbone.state_dict())
    # Without class token and norm, the encoder computes the same.
    bare = scattered("vit_nano", patch_size=8, img_size=32)
    vit: Any = bare.vit
    vit.pos_embed = nn.Parameter(vit.pos_embed[:, 1:])
    vit.cls_token, vit.num_prefix_tokens, vit.norm = None, 0, nn.Identity()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image)["last_feat"], bare(image)["s8"], rtol=1e-4, atol=1e-4)


def test_detectron2s_swin_returns_the_last_map_and_the_others_with_norm() -> None:
    exported = to_detectron2(scattered("swin_tiny", in_chans=2))
    assert exported.difference < 1e-4
    SwinTransformer(in_chans=2).load_state_dict(exported.backbone.state_dict())


def test_encoders_without_counterpart_are_rejected() -> None:
    t2t = build_encoder("t2t_vit_14")
    with pytest.raises(UserError, match=r"timm .* has no model of encoder 't2t_vit_14'"):
        to_timm(t2t)
    with pytest.raises(UserError, match="Detectron2 has no backbone like encoder 't2t_vit_14'"):
        to_detectron2(t2t)
    with pytest.raises(UserError, match=r"do not have the same tensors .*: its weights cannot be exported"):
        to_detectron2(build_encoder("timm:test_vit4", img_size=32))
    with pytest.raises(UserError, match="Detectron2 has no backbone like encoder 'timm:vit_tiny_patch16_dinov3_qkvb'"):
        to_detectron2(build_encoder("timm:vit_tiny_patch16_dinov3_qkvb", img_size=32))


@pytest.mark.slow
def test_exported_files_are_loaded_by_timm_and_detectron2(root: Path, tmp_path: Path) -> None:
    encoder = scattered("vit_nano", patch_size=8, img_size=32)
    save_encoder(encoder, tmp_path / "first.safetensors", {})
    done = run(
        root, "relvit-d2", "export-weights", tmp_path / "first.safetensors", "--to", "timm", tmp_path / "t.safetensors"
    )
    assert 'timm.create_model("vit_tiny_patch16_224"' in done.stdout
    arguments = done.stdout.split("timm.create_model(")[1].split(")\n")[0]
    model = eval(f"timm.create_model({arguments})", {"timm": timm})
    model.load_state_dict(load_file(tmp_path / "t.safetensors"))
    done = run(root, "relvit-d2", "convert", tmp_path / "t.safetensors", "--to", tmp_path / "second.safetensors")
    assert "timm: " in done.stdout and "agree with the original model" in done.stdout
    (first, _), (second, metadata) = (read_encoder(tmp_path / f"{n}.safetensors") for n in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert metadata["source"] == "timm: t.safetensors"
    run(root, "relvit-d2", "export-weights", tmp_path / "first.safetensors", "--to", "detectron2", tmp_path / "d.pth")
    net = Detectron2ViT(patch_size=8, embed_dim=128, depth=4, num_heads=4, pretrain_img_size=32)
    pyramid = SimpleFeaturePyramid(net, "last_feat", 16, (1.0, 0.5))
    DetectionCheckpointer(nn.ModuleDict({"backbone": pyramid})).load(str(tmp_path / "d.pth"))
    assert torch.equal(net.blocks[3].mlp.fc2.weight, first["vit.blocks.3.mlp.fc2.weight"])
    assert torch.equal(net.pos_embed, first["vit.pos_embed"])
    error = fails(
        root, "relvit-d2", "export-weights", tmp_path / "first.safetensors", "--to", "timm", tmp_path / "x.bin"
    )
    assert "does not end in .safetensors" in error
    error = fails(root, "relvit-d2", "convert", tmp_path / "no.pth", "--to", tmp_path / "x.safetensors")
    assert "does not exist" in error


def cached(cache: Path, model: str, repository: str) -> dict[str, Tensor]:
    """Write random weights into the cache of timm's downloads."""
    folder = cache / "hub" / f"models--timm--{repository}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0" * 40)
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = timm.create_model(model).state_dict()
    save_file(tensors, str(snapshot / "model.safetensors"))
    return tensors


OFFLINE = """
import sys, torch
from relvit_d2.encoders import build_encoder
from relvit_d2.conversion.encoder_file import feature_difference, load_encoder_weights
from relvit_d2.utils.errors import UserError
models = {"timm:test_vit": 16, "timm:test_vit3": 16, "timm:vit_tiny_patch16_dinov3_qkvb": 16, "timm:test_convnext": 4}
for name, patch in models.items():
    encoder = build_encoder(name, patch_size=patch, img_size=96)
    report = load_encoder_weights(encoder, "timm:test_vit.r160_in1k" if name == "timm:test_vit" else name)
    print(report.share, report.resized, report.metadata["pixel_mean"], feature_difference(encoder, report.path) < 1e-5)
for weights in ("timm:test_vit2", "timm:vit_small_patch99", "timm:test_vit.none"):
    try:
        load_encoder_weights(build_encoder("timm:test_vit2", img_size=32), weights)
    except UserError as error:
        print(error)
"""


def test_timm_weights_are_read_from_the_cache(tmp_path: Path) -> None:
    cached(tmp_path, "test_vit", "test_vit.r160_in1k")
    cached(tmp_path, "test_vit3", "test_vit3.r160_in1k")
    cached(tmp_path, "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m")
    cached(tmp_path, "test_convnext", "test_convnext.r160_in1k")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "1.0 ['vit.pos_embed'] [127.5, 127.5, 127.5] True"
    assert lines[1] == "1.0 ['vit.pos_embed'] [127.5, 127.5, 127.5] True"
    assert lines[2] == "1.0 [] [123.675, 116.28, 103.53] True"
    assert lines[3] == "1.0 [] [127.5, 127.5, 127.5] True"
    assert lines[4].startswith("'timm:test_vit2' is not in timm's cache and could not be downloaded (")
    assert lines[5].startswith("'timm:vit_small_patch99': timm 1.0.31 has no model 'vit_small_patch99'; did you mean")
    assert lines[6] == "'timm:test_vit.none': timm has no such weights; it has test_vit.r160_in1k"


def test_failed_downloads_are_reported_in_one_sentence(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    keys = ("MODEL.WEIGHTS", "timm:test_vit", "MODEL.ENCODER.NAME", "timm:test_vit", "MODEL.ENCODER.PATCH_SIZE", 16)
    error = fails(root, *command("pretrain_ssl.py", tmp_path / "out", *keys), fresh=True)
    assert "'timm:test_vit' is not in timm's cache and could not be downloaded" in error


def test_timm_weights_for_other_pixel_statistics_are_rejected(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    cached(tmp_path, "test_vit", "test_vit.r160_in1k")
    keys = ("MODEL.WEIGHTS", "timm:test_vit", "MODEL.ENCODER.NAME", "timm:test_vit", "MODEL.ENCODER.PATCH_SIZE", 16)
    anchors = ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]")
    error = fails(root, *command("train_net.py", tmp_path / "out", *keys, *anchors), fresh=True)
    assert "'timm:test_vit' was pre-trained with MODEL.PIXEL_MEAN [127.5, 127.5, 127.5]" in error
    half = ("MODEL.PIXEL_MEAN", "[127.5, 127.5, 127.5]", "MODEL.PIXEL_STD", "[127.5, 127.5, 127.5]")
    done = run(root, *command("pretrain_ssl.py", tmp_path / "ssl", *keys, *half, "SOLVER.MAX_ITER", 1), fresh=True)
    assert "weights 'timm:test_vit': 100.0% of the encoder's values matched" in done.stdout
    assert "not loaded from 'timm:test_vit': vit.pos_embed" in done.stdout
    assert "the loaded encoder agree" in done.stdout
    encoder = build_encoder("timm:test_vit", img_size=32, pos_embed=False)
    load_encoder_weights(encoder, tmp_path / "ssl/encoder.safetensors")
    assert feature_difference(encoder, tmp_path / "ssl/encoder.safetensors") < 1e-5
