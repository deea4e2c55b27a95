"""The contract of an encoder, for every member of the registry."""

import pytest
import torch

from relvit_d2.encoders import ENCODERS, build_encoder, encoder_from_keys
from relvit_d2.errors import UserError

NAMES = list(ENCODERS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (33, 70), (16, 16), (96, 32), (1, 5)])
def test_maps_have_the_shapes_that_the_strides_say(name: str, size: tuple[int, int]) -> None:
    encoder = build_encoder(name).eval()
    with torch.no_grad():
        maps = encoder(torch.randn(2, 3, *size))
        tokens = encoder.tokens(torch.randn(2, 3, *size))
    assert list(maps) == list(encoder.strides) == list(encoder.channels)
    for key, stride in encoder.strides.items():
        assert maps[key].shape == (2, encoder.channels[key], -(-size[0] // stride), -(-size[1] // stride))
        assert maps[key].isfinite().all()
    rows, cols = encoder.grid(*size)
    assert tokens.shape == (2, rows * cols, encoder.dim)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_last_map_row_by_row(name: str) -> None:
    encoder = build_encoder(name).eval()
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        assert torch.equal(encoder.tokens(images), encoder(images)[encoder.last].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str) -> None:
    encoder = build_encoder(name, img_size=64)
    features = encoder(torch.randn(2, 3, 64, 64))[encoder.last]
    # A random projection: the sum of squares behind a norm is constant, its gradient rounding noise.
    (features * torch.randn_like(features)).sum().backward()
    without = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6]
    assert without == []


@pytest.mark.parametrize("name", NAMES)
def test_the_config_builds_the_same_encoder_again(name: str) -> None:
    first = build_encoder(name, img_size=64, drop_path=0.1, in_chans=1)
    again = build_encoder(**first.to_config())
    again.load_state_dict(first.state_dict())
    image = torch.randn(1, 1, 40, 40)
    first.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(first.tokens(image), again.tokens(image))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_gives_finite_maps(name: str) -> None:
    encoder = build_encoder(name).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert encoder.tokens(torch.randn(1, 3, 32, 32)).isfinite().all()


# Parameters of timm's models of the same shape, without a head.
@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("vit_small", {"patch_size": 16}, 21_665_664),
        ("vit_small", {"patch_size": 32}, 22_493_952),
        ("vit_small", {"patch_size": 4, "img_size": 32}, 21_338_496),
        ("vit_small", {"patch_size": 8, "img_size": 64}, 21_393_792),
    ],
)
def test_parameter_counts(name: str, arguments: dict[str, int], count: int) -> None:
    assert sum(p.numel() for p in build_encoder(name, **arguments).parameters()) == count


def test_without_position_embedding_shuffled_patches_give_shuffled_tokens() -> None:
    encoder = build_encoder("vit_nano", patch_size=4, img_size=16, pos_embed=False).eval()
    patches = torch.randn(1, 3, 4, 4, 4, 4)  # channel, row, y, column, x
    order = torch.randperm(16)
    cells = patches.permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 3, 4, 4)
    shuffled = cells[:, order].reshape(1, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5)
    with torch.no_grad():
        straight = encoder.tokens(patches.reshape(1, 3, 16, 16))
        permuted = encoder.tokens(shuffled.reshape(1, 3, 16, 16))
    torch.testing.assert_close(permuted, straight[:, order], atol=1e-4, rtol=1e-4)


def test_an_image_larger_than_the_position_grid_is_resampled_not_refused() -> None:
    encoder = build_encoder("vit_nano", patch_size=4, img_size=16).eval()
    with torch.no_grad():
        assert encoder.tokens(torch.randn(1, 3, 20, 12)).shape == (1, 15, 128)


def test_bad_arguments_are_one_sentence() -> None:
    with pytest.raises(UserError, match="did you mean 'vit_small'"):
        build_encoder("vit_smal")
    with pytest.raises(UserError, match="did you mean 'patch_size'"):
        build_encoder("vit_nano", patchsize=4)
    with pytest.raises(UserError, match=r"IMG_SIZE 30.*PATCH_SIZE 16"):
        encoder_from_keys({"ENCODER": {"NAME": "vit_nano", "IMG_SIZE": 30, "PATCH_SIZE": 16}, "COMPILE": False})
