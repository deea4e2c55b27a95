"""Relative positions, compared with Detectron2's and with sums over all pairs."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling.backbone.vit import ViT
from torch import Tensor, nn
from torch.export import Dim, export

from relvit_d2.conversion.encoder_file import feature_difference, load_encoder_weights, save_encoder
from relvit_d2.encoders import build_encoder, encoder_from_keys
from relvit_d2.encoders.vit import VITDET_SIZES
from relvit_d2.encoders.windowed import add_relative_positions, windowed_attention
from relvit_d2.utils.errors import UserError

SIDE, PATCH = 32, 4  # pixels; 8 x 8 patches
WINDOWS: dict[str, Any] = {"window": 3, "global_blocks": 2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def scattered(name: str = "vit_nano", **arguments: Any) -> Any:
    """Build an encoder in which no relative position is zero."""
    arguments = {"patch_size": PATCH, "img_size": SIDE, "rel_pos": True} | arguments
    encoder = build_encoder(name, **arguments).eval()
    for value in encoder.parameters():
        value.data.add_(0.1 * torch.randn_like(value))
    return encoder


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return dict(zip(names, torch.autograd.grad((output * weights).sum(), parameters), strict=True))


@pytest.mark.parametrize("window", [0, 3, 8])
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (36, 60)])
def test_features_and_gradients_equal_detectron2s(window: int, size: tuple[int, int]) -> None:
    ours = scattered("vitdet:nano", window=window, global_blocks=2, pos_embed=False)
    theirs = ViT(
        SIDE,
        PATCH,
        3,
        128,
        4,
        4,
        window_size=window,
        window_block_indexes=[0, 2] if window else [],
        use_abs_pos=False,
        use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    theirs.load_state_dict(ours.vit.state_dict())
    images = torch.randn(2, 3, *size)
    (found,), (expected,) = ours(images).values(), theirs(images).values()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients(ours.vit, found), gradients(theirs, expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "cols", "window"), [(3, 3, 0), (2, 3, 3), (1, 3, 3)])
def test_scores_are_sums_over_all_pairs_of_patches(rows: int, cols: int, window: int) -> None:
    """One window, of which a side may be shorter than the table, and a class token without relative positions."""
    attention = scattered(window=3).vit.blocks[0].attn
    add_relative_positions(attention, 3)
    for axis in "hw":
        getattr(attention, f"rel_pos_{axis}").data.normal_()
    x = torch.randn(1, 1 + rows * cols, 128)
    heads, width = 4, 32
    q, k, v = attention.qkv(x)[0].view(-1, 3, heads, width).permute(1, 2, 0, 3)
    scores = q @ k.mT / math.sqrt(width)
    # The tables of global attention would be resized to other sides.
    for i in range(rows * cols):
        for j in range(rows * cols):
            down, across = i // cols - j // cols, i % cols - j % cols
            offset = attention.rel_pos_h[2 + down] + attention.rel_pos_w[2 + across]
            scores[:, 1 + i, 1 + j] += q[:, 1 + i] @ offset
    expected = attention.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))[None]
    torch.testing.assert_close(windowed_attention(attention, x, (rows, cols), window), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (40, 20), (1, 1)])
@pytest.mark.parametrize("windows", [{}, WINDOWS])
def test_new_relative_positions_change_nothing(windows: dict[str, Any], size: tuple[int, int]) -> None:
    without = scattered(rel_pos=False, **windows)
    encoder: Any = build_encoder("vit_nano", patch_size=PATCH, img_size=SIDE, rel_pos=True, **windows).eval()
    new = encoder.load_state_dict(without.state_dict(), strict=False)
    assert set(new.missing_keys) == encoder._relative_positions() and not new.unexpected_keys
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(encoder.tokens(images), without.tokens(images), rtol=1e-4, atol=1e-4)


def test_selected_and_recomputed_blocks_give_the_same_features() -> None:
    plain, selecting, recomputing = (scattered(**WINDOWS) for _ in range(3))
    for other in (selecting, recomputing):
        other.load_state_dict(plain.state_dict())
    selecting.select_blocks(2)
    recomputing.checkpoint_blocks()
    images = torch.randn(2, 3, 36, 28)
    expected = plain.tokens(images)
    for other in (selecting, recomputing):
        torch.testing.assert_close(other.tokens(images), expected)
    found = gradients(recomputing, recomputing.tokens(images))
    torch.testing.assert_close(found, gradients(plain, expected), rtol=1e-4, atol=1e-4)


def test_relative_positions_give_position_information() -> None:
    encoder = scattered("vitdet:nano", pos_embed=False)
    assert encoder.has_position_information
    assert not build_encoder("vitdet:nano", pos_embed=False).has_position_information
    image = torch.randn(1, 3, SIDE, SIDE)
    moved, tokens = image.roll(PATCH, 3), encoder(image)["s4"]
    assert not torch.allclose(encoder(moved)["s4"], tokens.roll(1, 3), atol=1e-2)


def test_weights_of_another_image_size_are_resized(tmp_path: Path) -> None:
    file = tmp_path / "encoder.safetensors"
    save_encoder(scattered(**WINDOWS), file, {})
    larger = build_encoder("vit_nano", patch_size=PATCH, img_size=48, rel_pos=True, **WINDOWS)
    report = load_encoder_weights(larger, file)
    assert {"vit.pos_embed", "vit.blocks.1.attn.rel_pos_h", "vit.blocks.3.attn.rel_pos_w"} <= {*report.resized}
    assert len(report.resized) == 5 and report.share == 1
    assert feature_difference(larger, file) < 1e-5


def test_weights_load_with_and_without_relative_positions(tmp_path: Path) -> None:
    with_positions, without = tmp_path / "with.safetensors", tmp_path / "without.safetensors"
    save_encoder(scattered(**WINDOWS), with_positions, {})
    save_encoder(scattered(rel_pos=False), without, {})
    plain: Any = build_encoder("vit_nano", patch_size=PATCH, img_size=SIDE, **WINDOWS)
    report = load_encoder_weights(plain, with_positions)
    assert plain.lacks(report.metadata["encoder"]) == {*report.unexpected} and report.unexpected
    assert feature_difference(plain, with_positions) < 1e-5
    extended: Any = build_encoder("vit_nano", patch_size=PATCH, img_size=SIDE, rel_pos=True, **WINDOWS)
    assert {*load_encoder_weights(extended, without).fresh} == extended._relative_positions()
    assert feature_difference(extended, without) < 1e-5
    other = build_encoder("vit_nano", patch_size=PATCH, img_size=SIDE, rel_pos=True, window=4, global_blocks=2)
    with pytest.raises(UserError, match=r"relative positions for window 3.*set MODEL.ENCODER.WINDOW 3"):
        load_encoder_weights(other, with_positions)


def test_encoders_without_the_option_and_unknown_sizes_are_refused() -> None:
    keys = {"NAME": "swin_tiny", "PATCH_SIZE": 4, "REL_POS": True}
    with pytest.raises(UserError, match=r"MODEL.ENCODER.REL_POS: encoder 'swin_tiny'.*set it to False"):
        encoder_from_keys({"ENCODER": keys, "ACTIVATION_CHECKPOINT": False, "COMPILE": False})
    with pytest.raises(UserError, match=r"unknown encoder 'vitdet:bas'; did you mean 'base'"):
        build_encoder("vitdet:bas")
    with pytest.raises(UserError, match=r"unknown encoder 'swin:smal'; did you mean 'small'"):
        build_encoder("swin:smal")


@pytest.mark.parametrize("size", VITDET_SIZES)
def test_sizes_are_those_of_detectron2s_vit(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of values of ViT-B, L and H: "An Image is Worth 16x16 Words", table 1 (86, 307 and 632 millions)."""
    dim, depth, heads = VITDET_SIZES[size]
    last = [depth * (i + 1) // 4 - 1 for i in range(4)]
    others = [index for index in range(depth) if index not in last]
    rates = torch.zeros(depth)  # Detectron2 reads them, which is impossible on the meta device
    monkeypatch.setattr(torch, "linspace", lambda *arguments, **options: rates)
    with torch.device("meta"):
        ours: Any = build_encoder(f"vitdet:{size}", window=14, rel_pos=True)
        theirs = ViT(224, 16, 3, dim, depth, heads, use_rel_pos=True, window_size=14, window_block_indexes=others)
    shapes = {name: value.shape for name, value in theirs.state_dict().items() if name != "pos_embed"}
    assert {name: v.shape for name, v in ours.vit.state_dict().items() if name != "pos_embed"} == shapes
    published = {"base": 86, "large": 303, "huge": 631}  # without the classifier of the table
    if size in published:
        assert round(sum(value.numel() for value in ours.parameters()) / 1e6) == published[size]


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3])
def test_a_compiled_vit_trains_on_images_of_changing_size(window: int) -> None:
    torch._dynamo.reset()
    plain, compiled = (scattered(window=window, global_blocks=2) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.forward_blocks = torch.compile(compiled.forward_blocks, backend="aot_eager", fullgraph=True)
    for size in ((36, 28), (24, 44), (40, 64)):
        images = torch.randn(2, 3, *size)
        found, expected = compiled.tokens(images), plain.tokens(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradients(compiled, found), gradients(plain, expected), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_exported_vit_accepts_sizes_above_its_window() -> None:
    encoder = scattered(**WINDOWS)
    sizes = ({0: Dim.STATIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported = export(encoder, (torch.randn(1, 3, 36, 52),), dynamic_shapes=sizes).module()
    for size in ((32, 32), (17, 60), (36, 24)):
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(exported(images), encoder(images), rtol=1e-4, atol=1e-4)
