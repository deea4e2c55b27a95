"""Window attention, compared with Detectron2's and with global attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling.backbone.vit import ViT
from torch import Tensor, nn
from torch.export import Dim, export

from relvit_d2.conversion.encoder_file import feature_difference, load_encoder_weights, save_encoder
from relvit_d2.encoders import build_encoder, encoder_from_keys
from relvit_d2.utils.errors import UserError

SIDE, PATCH = 32, 4  # pixels; 8 x 8 patches


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def vit(**arguments: int) -> Any:
    return build_encoder("vit_nano", patch_size=PATCH, img_size=SIDE, **arguments).eval()


def twins(*arguments: dict[str, int]) -> list[Any]:
    """Return encoders with the same weights."""
    encoders = [vit(**each) for each in arguments]
    for encoder in encoders[1:]:
        encoder.load_state_dict(encoders[0].state_dict())
    return encoders


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return dict(zip(names, torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("window", [2, 3, 8])
def test_features_and_gradients_equal_detectron2s(window: int) -> None:
    ours, arguments = vit(window=window, global_blocks=2), {"pretrain_img_size": SIDE, "pretrain_use_cls_token": False}
    # Detectron2's has no class token and no final norm.
    ours.vit.cls_token, ours.vit.num_prefix_tokens, ours.vit.norm = None, 0, nn.Identity()
    ours.vit.pos_embed = nn.Parameter(ours.vit.pos_embed[:, 1:])
    nn.init.normal_(ours.vit.blocks[0].attn.qkv.bias)  # the value of padded tokens
    theirs = ViT(SIDE, PATCH, 3, 128, 4, 4, window_size=window, window_block_indexes=[0, 2], **arguments)
    theirs.load_state_dict(ours.vit.state_dict())
    images = torch.randn(2, 3, SIDE, SIDE)
    (found,), (expected,) = ours(images).values(), theirs(images).values()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients(ours.vit, found), gradients(theirs, expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("window", [0, 3])
def test_both_kinds_of_attention_agree_in_bfloat16(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = vit(window=window, global_blocks=2).train(), torch.randn(2, 3, SIDE, SIDE)

    def run(bfloat16: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            (output,) = model(images).values()
        found = gradients(model, output.float()).values()
        return [output.float(), *(value for value in found if value is not None)]

    def errors() -> Tensor:
        pairs = zip(run(True), exact, strict=True)
        return torch.stack([(found - expected).norm() / expected.norm() for found, expected in pairs])

    exact = run(False)
    plain = errors()
    monkeypatch.setattr("relvit_d2.encoders.windowed.FUSED_FROM", 0)
    fused = errors()
    assert all(map(torch.equal, run(False), exact))
    assert fused.max() < 0.1 and not torch.equal(plain, fused)
    assert (plain < 1.5 * fused + 0.01).all()


@pytest.mark.parametrize("size", [(32, 32), (40, 20), (13, 40), (1, 1)])
def test_a_window_that_covers_the_image_gives_global_attention(size: tuple[int, int]) -> None:
    everywhere, windowed = twins({}, {"window": 10, "global_blocks": 0})
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(windowed(images), everywhere(images))


def test_a_patch_affects_its_window_and_through_the_class_token_the_others() -> None:
    encoder = vit(window=4, global_blocks=0)
    encoder.vit.blocks = encoder.vit.blocks[:1]
    encoder._windows = {0: 4}
    images = torch.randn(1, 3, SIDE, SIDE)
    changed = images.clone()
    changed[..., :PATCH, :PATCH] += 1
    differs = (encoder(images)["s4"] != encoder(changed)["s4"]).any(1)[0]
    assert differs[:4, :4].all() and not differs[4:].any() and not differs[:, 4:].any()
    encoder.vit.blocks.append(vit().vit.blocks[0])
    encoder._windows = {0: 4, 1: 4}
    assert (encoder(images)["s4"] != encoder(changed)["s4"]).any(1).all()


def test_global_blocks_are_those_of_vitdet() -> None:
    encoder: Any = build_encoder("vit_tiny", window=14)
    assert sorted(encoder._windows) == [0, 1, 3, 4, 6, 7, 9, 10]


def test_selected_and_recomputed_blocks_give_the_same_features() -> None:
    plain, selecting, recomputing = twins(*[{"window": 3, "global_blocks": 2}] * 3)
    selecting.select_blocks(2)
    recomputing.checkpoint_blocks()
    images = torch.randn(2, 3, 36, 28)
    expected = plain.tokens(images)
    assert list(selecting(images)) == ["b2", "s4"]
    for other in (selecting, recomputing):
        torch.testing.assert_close(other.tokens(images), expected)
    found = gradients(recomputing, recomputing.tokens(images))
    torch.testing.assert_close(found, gradients(plain, expected), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3])
def test_a_compiled_vit_trains_on_images_of_changing_size(window: int) -> None:
    torch._dynamo.reset()
    plain, compiled = twins(*[{"window": window, "global_blocks": 2}] * 2)
    compiled.forward_blocks = torch.compile(compiled.forward_blocks, backend="aot_eager", fullgraph=True)
    for size in ((36, 28), (24, 44), (40, 64)):
        images = torch.randn(2, 3, *size)
        found, expected = compiled.tokens(images), plain.tokens(images)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(compiled, found), gradients(plain, expected), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_exported_windowed_vit_accepts_sizes_above_its_window() -> None:
    encoder = vit(window=3, global_blocks=2)
    sizes = ({0: Dim.STATIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported = export(encoder, (torch.randn(1, 3, 36, 52),), dynamic_shapes=sizes).module()
    for size in ((32, 32), (17, 60), (36, 24)):
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(exported(images), encoder(images))


def test_weights_of_global_attention_load_into_a_windowed_encoder(tmp_path: Path) -> None:
    save_encoder(vit(), tmp_path / "encoder.safetensors", {})
    windowed = vit(window=3, global_blocks=2)
    assert load_encoder_weights(windowed, tmp_path / "encoder.safetensors").share == 1
    assert feature_difference(windowed, tmp_path / "encoder.safetensors") < 1e-6


def test_windows_give_position_information() -> None:
    assert build_encoder("vit_nano", pos_embed=False, window=2, global_blocks=2).has_position_information
    assert not build_encoder("vit_nano", pos_embed=False, window=2, global_blocks=4).has_position_information


def test_invalid_windows_are_rejected() -> None:
    with pytest.raises(UserError, match="WINDOW -1"):
        vit(window=-1)
    with pytest.raises(UserError, match="0 to 4 blocks"):
        vit(window=2, global_blocks=5)
    keys = {"NAME": "swin_tiny", "PATCH_SIZE": 4, "GLOBAL_BLOCKS": 4}
    assert encoder_from_keys({"ENCODER": {**keys, "WINDOW": 0}, "ACTIVATION_CHECKPOINT": False, "COMPILE": False})
    with pytest.raises(UserError, match=r"'swin_tiny'.*set it to 0"):
        encoder_from_keys({"ENCODER": {**keys, "WINDOW": 14}, "ACTIVATION_CHECKPOINT": False, "COMPILE": False})
