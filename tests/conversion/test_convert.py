"""Conversion of random weights of every family, under the names of their authors."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from relvit_d2.conversion.checkpoint_file import find_encoder
from relvit_d2.conversion.convert import CONVERTERS, Converted, convert, detect, fold_scales
from relvit_d2.conversion.converted import verify
from relvit_d2.conversion.encoder_file import feature_difference, load_encoder_weights, save_encoder
from relvit_d2.encoders import build_encoder
from relvit_d2.encoders.t2t import sinusoid
from relvit_d2.utils.errors import UserError

Tensors = dict[str, Tensor]
# Arguments that make timm's ViT-Ti a vit_nano, with the patch size of DINOv2.
NANO: dict[str, Any] = {
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "img_size": 28,
    "patch_size": 14,
    "num_classes": 0,
}


def scattered(model: nn.Module, by: float = 0.1) -> nn.Module:
    """Randomise all parameters, so that none is 0 or 1 and can be left out unnoticed."""
    torch.manual_seed(0)
    for value in model.parameters():
        value.data.add_(by * torch.randn_like(value))
    return model.eval()


def vit(**arguments: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = scattered(timm.create_model("vit_tiny_patch16_224", **NANO | arguments))
    assert isinstance(model, VisionTransformer)
    return model


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def dinov2_tensors(**arguments: Any) -> Tensors:
    return vit(init_values=1.0, **arguments).state_dict() | {"mask_token": torch.zeros(1, 128)}


def in_chunks(tensors: Tensors) -> Tensors:
    """Name the blocks in chunks of two, as DINOv2 does in training; blocks keep their index."""
    return {re.sub(r"^blocks\.(\d)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", n): v for n, v in tensors.items()}


def microsoft(swin: SwinTransformer) -> Tensors:
    """Return timm's tensors under the names of the Swin Transformer's authors, with their buffers."""
    tensors = {}
    for name, value in swin.state_dict().items():
        match = re.match(r"layers\.(\d)\.downsample\.(.*)", name)
        tensors[f"layers.{int(match[1]) - 1}.downsample.{match[2]}" if match else name] = value
    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    return tensors | index | {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49), "head.weight": torch.ones(9, 768)}


def heads(dim: int) -> Tensors:
    """The heads of guglielmocamporese/relvit, models/relvit.py and models/layers.py."""
    relation = {f"rel_head.heads.{i}.{k}_lin.weight": torch.ones(dim // 9, dim) for i in range(9) for k in "qkv"}
    return relation | {"abs_pos_head.weight": torch.ones(4, dim), "abs_pos_head.bias": torch.ones(4)}


def t2t_tensors() -> Tensors:
    encoder = scattered(build_encoder("t2t_vit_14"), 0.02)  # small enough that attention does not saturate
    table = sinusoid(17, 384).float()[None]
    return encoder.state_dict() | {"pos_embed": table, "head.weight": torch.ones(3, 384)}


def converted(content: Any, folder: Path, kind: str | None = None) -> Converted:
    torch.save(content, folder / "source.pth")
    return convert(find_encoder(folder / "source.pth"), kind)


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "timm": ("timm", lambda: vit().state_dict() | {"head.weight": torch.ones(7, 128), "head.bias": torch.ones(7)}),
    "timm, gray": ("timm", lambda: {"state_dict": under("module.", vit(in_chans=1).state_dict())}),
    "timm, five channels": ("timm", lambda: {"model": under("encoder.", vit(in_chans=5).state_dict())}),
    "mae": (
        "mae",
        lambda: {
            "model": vit().state_dict()
            | {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 5, 8)}
            | {"decoder_blocks.0.attn.qkv.weight": torch.ones(24, 8), "decoder_embed.weight": torch.ones(8, 128)},
            "args": argparse.Namespace(blr=1e-3),
        },
    ),
    "dino": (
        "dino",
        lambda: {
            "student": under("module.backbone.", {n: v * 0 for n, v in vit().state_dict().items()}),
            "teacher": under("backbone.", vit().state_dict()) | {"head.mlp.0.weight": torch.ones(8, 128)},
            "args": argparse.Namespace(arch="vit_tiny"),
        },
    ),
    "dinov2": ("dinov2", dinov2_tensors),
    "dinov2 in chunks": ("dinov2", lambda: {"teacher": under("backbone.", in_chunks(dinov2_tensors()))}),
    "relvit": (
        "relvit",
        lambda: {"state_dict": under("backbone.", vit().state_dict()) | heads(128), "callbacks": {}},
    ),
    "lightly-train": (
        "lightly",
        lambda: {
            "state_dict": under("teacher_embedding_model.wrapped_model._model.", vit().state_dict())
            | under("student_embedding_model.wrapped_model._model.", vit().state_dict()),
            "lightly_train": {"version": "0"},
        },
    ),
    "lightly": (
        "lightly",
        lambda: under("backbone.", under("vit.", vit().state_dict()) | {"mask_token": torch.ones(1, 1, 9)}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_detected_and_give_the_features_of_the_original_model(case: str, tmp_path: Path) -> None:
    kind, make = CASES[case]
    found = converted(make(), tmp_path)
    assert found.kind == kind
    assert found.encoder.name == "vit_nano"
    assert found.encoder.arguments["patch_size"] == 14
    assert found.encoder.arguments["img_size"] == 28 or not found.encoder.arguments["pos_embed"]
    assert "agree" in str(found)
    reference = vit(**({"init_values": 1.0} if "dinov2" in case else {}), in_chans=found.encoder.arguments["in_chans"])
    if kind == "relvit":
        reference.pos_embed = None  # not used in the authors' pre-training
    image = torch.randn(2, found.encoder.arguments["in_chans"], 28, 28)
    with torch.no_grad():
        features = reference.forward_features(image)[:, 1:]
        torch.testing.assert_close(found.encoder.tokens(image), features, rtol=1e-4, atol=1e-4)


def test_every_family_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} | {"swin", "t2t"} == set(CONVERTERS)


def test_a_swin_with_the_names_of_its_authors_is_converted(tmp_path: Path) -> None:
    model = scattered(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, in_chans=1))
    assert isinstance(model, SwinTransformer)
    found = converted({"model": microsoft(model)}, tmp_path)
    assert (found.kind, found.encoder.name, len(found.dropped)) == ("swin", "swin_tiny", 3)
    found.encoder.state_dict()["swin.layers.1.blocks.0.norm1.weight"].mul_(2)
    with pytest.raises(UserError, match="features of 'x' as swin_tiny differ"):
        verify(found, "x")


def test_a_t2t_is_converted_and_another_position_table_is_rejected(tmp_path: Path) -> None:
    tensors = t2t_tensors()
    found = converted({"state_dict_ema": under("module.", tensors)}, tmp_path)
    assert (found.kind, found.encoder.name, found.side) == ("t2t", "t2t_vit_14", 64)
    assert found.dropped == ["head.weight", "pos_embed"]
    found.encoder.state_dict()["tokens_to_token.attention2.proj.weight"].mul_(1.1)
    with pytest.raises(UserError, match="differ"):
        verify(found, "x")
    with pytest.raises(UserError, match="not T2T-ViT's sinusoid"):
        converted(tensors | {"pos_embed": tensors["pos_embed"] + 0.01}, tmp_path)


def test_models_with_registers_keep_timms_name_and_the_class_token_position(tmp_path: Path) -> None:
    model: Any = scattered(timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28))
    tensors = model.state_dict() | {"mask_token": torch.zeros(1, 384)}
    position = torch.randn(1, 1, 384)
    tensors["register_tokens"] = tensors.pop("reg_token")
    tensors["cls_token"] = tensors["cls_token"] - position
    tensors["pos_embed"] = torch.cat((position, tensors["pos_embed"]), 1)
    found = converted(tensors, tmp_path)
    assert found.encoder.name == "timm:vit_small_patch14_reg4_dinov2"
    image = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = model.forward_features(image)[:, 5:]
        torch.testing.assert_close(found.encoder.tokens(image), expected, rtol=1e-4, atol=1e-4)


def test_the_optimizer_state_shows_whether_positions_were_trained(tmp_path: Path) -> None:
    content = {"state_dict": under("backbone.", vit().state_dict()) | heads(128)}
    states: dict[int, Any]
    for states, trained in (({0: {}, 2: {}}, False), ({0: {}, 1: {}, 2: {}}, True)):
        found = converted(content | {"optimizer_states": [{"state": states}]}, tmp_path)
        assert found.encoder.arguments["pos_embed"] is trained
        assert "heads of pretext tasks and classifier dropped: rel_head, abs_pos_head" in str(found)
    classified = content["state_dict"] | {"clf_head.weight": torch.ones(3, 128)}
    assert converted({"state_dict": classified}, tmp_path).encoder.arguments["pos_embed"]


def test_folded_layer_scale_gives_the_same_output() -> None:
    layer, scale, x = nn.Linear(5, 3), torch.randn(3), torch.randn(2, 5)
    for other in ("ls1.gamma", "gamma_1"):
        named = under("blocks.0.attn.proj.", layer.state_dict()) | {f"blocks.0.{other}": scale}
        folded = fold_scales(named)
        assert list(folded) == ["blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias"]
        torch.testing.assert_close(nn.functional.linear(x, *folded.values()), layer(x) * scale)


def test_config_json_names_models_that_only_timm_has(tmp_path: Path) -> None:
    model = scattered(timm.create_model("test_vit2", num_classes=4, img_size=64))
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=r"8 blocks of width 64.*config.json"):
        convert(find_encoder(tmp_path / "model.safetensors"))
    statistics = '{"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}'
    (tmp_path / "config.json").write_text(f'{{"architecture": "test_vit2", "pretrained_cfg": {statistics}}}')
    found = convert(find_encoder(tmp_path / "model.safetensors"))
    assert found.encoder.name == "timm:test_vit2"
    assert found.pixels == {"pixel_mean": [127.5] * 3, "pixel_std": [63.75, 127.5, 127.5], "input_format": "RGB"}
    assert {name.split(".")[0] for name in found.dropped} == {"fc_norm", "head"}


def test_rotary_positions_are_not_taken_for_no_positions(tmp_path: Path) -> None:
    """Names and shapes of the tensors are those of a ``vit_small`` without position embedding."""
    model = scattered(timm.create_model("vit_small_patch16_rope_224"))
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=r"may have rotary positions: put timm's config.json"):
        convert(find_encoder(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text('{"architecture": "vit_small_patch16_rope_224"}')
    assert convert(find_encoder(tmp_path / "model.safetensors")).encoder.name == "timm:vit_small_patch16_rope_224"


def test_patches_of_14_pixels_are_resized_to_16(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(converted(dinov2_tensors(img_size=56), tmp_path).encoder, path, {})
    detector = build_encoder("vit_nano", patch_size=16, img_size=96)
    report = load_encoder_weights(detector, path)
    assert sorted(report.resized) == ["vit.patch_embed.proj.weight", "vit.pos_embed"]
    assert feature_difference(detector, path) < 1e-4
    detector.state_dict()["vit.patch_embed.proj.weight"].mul_(1.01)
    assert feature_difference(detector, path) > 1e-4
    with pytest.raises(UserError, match=r"for patch_size 14, this encoder has 32: set MODEL.ENCODER.PATCH_SIZE 14"):
        load_encoder_weights(build_encoder("vit_nano", patch_size=32, img_size=96), path)


@pytest.mark.parametrize("name", ["vit_nano", pytest.param("swin_tiny", marks=pytest.mark.slow)])
def test_rgb_weights_load_into_grayscale_encoders_only(name: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(build_encoder(name, img_size=32), path, {})
    gray = build_encoder(name, img_size=32, in_chans=1)
    assert len(load_encoder_weights(gray, path).resized) == 1
    assert feature_difference(gray, path) < 1e-5
    with pytest.raises(UserError, match=r"for in_chans 3, this encoder has 5: build it with in_chans=3"):
        load_encoder_weights(build_encoder(name, img_size=32, in_chans=5), path)


def test_unsupported_files_are_reported_in_one_sentence(tmp_path: Path) -> None:
    plain = vit().state_dict()
    for content, message in (
        ({"layer1.0.conv1.weight": torch.ones(1)}, r"contains no ViT.*no tensor \*patch_embed.*layer1.0.conv1.weight"),
        ([1], "contains a list"),
        ({n: v for n, v in plain.items() if "blocks.2" not in n}, "4 blocks of width 128"),
        (plain | {"pos_embed": torch.ones(1, 6, 128)}, "4 blocks of width 128"),
        (vit(depth=5).state_dict(), "5 blocks of width 128"),
    ):
        with pytest.raises(UserError, match=message):
            converted(content, tmp_path)
    with pytest.raises(UserError, match="does not contain the tensors of a swin model"):
        converted(plain, tmp_path, "swin")
    (tmp_path / "text.bin").write_text("no tensors")
    for file, message in (("text.bin", "without executing code"), ("none.pth", "does not exist")):
        with pytest.raises(UserError, match=message):
            find_encoder(tmp_path / file)


class Trap:
    """Executes code when it is unpickled."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("from test_convert import Trap; Trap.ran = True",))


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    torch.save({"model": vit().state_dict(), "args": Trap()}, tmp_path / "trap.pth")
    found = find_encoder(tmp_path / "trap.pth")
    assert detect(found) == "timm" and convert(found).encoder.name == "vit_nano"
    assert not Trap.ran
    assert math.prod(found.tensors["cls_token"].shape) == 128
