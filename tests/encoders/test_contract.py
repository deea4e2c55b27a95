"""The contract of an encoder, for every member of the registry."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, export

from relvit_d2.encoders import ENCODERS, Encoder, build_encoder, encoder_from_keys
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.task import PretextTask
from relvit_d2.utils.errors import UserError

ROTARY = ("timm:vit_tiny_patch16_dinov3_qkvb", "timm:eva02_tiny_patch14_224")


def names(slow: tuple[str, ...]) -> list[Any]:
    """All encoders and one of each family; the larger ViTs run the code of the smallest one."""
    members = (*ENCODERS, "timm:test_vit", "vitdet:nano", "timm:test_convnext", *ROTARY)
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in members]


NAMES = names(slow=("vit_base",))
FAST_NAMES = names(slow=("vit_tiny", "vit_small", "vit_base", *ROTARY))
COMPILED = names(slow=("vit_tiny", "vit_small", "vit_base", "swin_tiny", "t2t_vit_14", *ROTARY))  # takes long
PLAIN = {"ACTIVATION_CHECKPOINT": False, "COMPILE": False}  # keys of MODEL


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@cache
def built(name: str) -> Encoder:
    """Return an encoder in evaluation mode, for tests that do not change it."""
    return build_encoder(name, img_size=64).eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (33, 70), (16, 16), (96, 32), (1, 5), (225, 260)])
def test_shapes_of_maps_follow_from_strides(name: str, size: tuple[int, int]) -> None:
    encoder, images = built(name), torch.randn(2, 3, *size)
    with torch.no_grad():
        maps, tokens = encoder(images), encoder.tokens(images)
    assert list(maps) == list(encoder.strides) == list(encoder.channels)
    for key, stride in encoder.strides.items():
        assert maps[key].shape == (2, encoder.channels[key], -(-size[0] // stride), -(-size[1] // stride))
        assert maps[key].isfinite().all()
    rows, cols = encoder.grid(*size)
    assert tokens.shape == (2, rows * cols, encoder.dim)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_last_map_in_row_major_order(name: str) -> None:
    encoder, images = built(name), torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        assert torch.equal(encoder.tokens(images), encoder(images)[encoder.last].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["vit_nano", "swin_tiny"])
def test_images_are_padded_with_zeros_on_the_right_and_below(name: str) -> None:
    encoder, images = built(name), torch.randn(1, 3, 33, 70)
    patch = encoder.arguments["patch_size"]
    padded = F.pad(images, (0, -70 % patch, 0, -33 % patch))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), encoder(padded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str) -> None:
    encoder = build_encoder(name, img_size=64)
    for key, value in encoder.named_parameters():
        if "gamma" in key:  # LayerScale, initially 1e-5, which scales the gradients of a block
            value.data.fill_(1)
    features = encoder(torch.randn(2, 3, 64, 64))[encoder.last]
    # A random projection, since the sum of squares after a norm is constant.
    (features * torch.randn_like(features)).sum().backward()
    without = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6]
    assert without == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_chans", [1, 5])
def test_features_depend_on_every_channel(name: str, in_chans: int) -> None:
    encoder, images = build_encoder(name, img_size=64, in_chans=in_chans).eval(), torch.randn(1, in_chans, 32, 32)
    features = encoder.tokens(images.requires_grad_())
    (features * torch.randn_like(features)).sum().backward()
    assert images.grad is not None and (images.grad.abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_config_builds_the_same_encoder_again(name: str) -> None:
    first = build_encoder(name, img_size=64, in_chans=1, drop_path=0.5, dropout=0.5)
    again = build_encoder(**first.to_config())
    again.load_state_dict(first.state_dict())
    image = torch.randn(1, 1, 40, 40)
    for mode in (False, True):
        found = []
        for encoder in (first, again):
            torch.manual_seed(1)
            with torch.no_grad():
                found.append(encoder.train(mode).tokens(image))
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *((name, "drop_path") for name in ENCODERS if name != "vit_base"),
        ("vit_nano", "dropout"),
        ("swin_tiny", "dropout"),
    ],
)
def test_dropout_and_drop_path_are_for_training_only(name: str, argument: str) -> None:
    plain, encoder = built(name), build_encoder(name, img_size=64, **{argument: 0.5})
    encoder.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = plain.tokens(images)
        assert torch.equal(encoder.eval().tokens(images), expected)
        assert not torch.allclose(encoder.train().tokens(images), expected, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_is_close_to_float32(name: str) -> None:
    encoder, images = built(name), torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        full = encoder(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(images)
    for key, expected in full.items():
        assert (half[key].float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_pretext_losses_reach_every_parameter(name: str) -> None:
    encoder = build_encoder(name, img_size=64)
    side = 2 * encoder.strides[encoder.last]
    grid = encoder.grid(side, side + 1)
    assert grid == (2, 3)
    images = torch.randn(2, 3, side, side + 1)
    task = PretextTask(encoder.dim, grid, {"relation": 1.0, "position": 1.0})
    losses = task(encoder.tokens(images), PatchLayout.full(2, grid))
    (losses["loss_relation"] + losses["loss_position"]).backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def gradients(encoder: Encoder, images: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of a training pass by name, and the bytes that autograd saved."""
    torch.manual_seed(1)
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        features = encoder(images)[encoder.last]
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    saved = sum(size for pointer, size in storages.items() if pointer not in parameters)
    (features * torch.randn_like(features)).sum().backward()
    return {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}, saved


@pytest.mark.parametrize("name", FAST_NAMES)
def test_recomputed_blocks_save_memory_and_give_the_same_gradients(name: str) -> None:
    keys = {"NAME": name, "PATCH_SIZE": built(name).arguments["patch_size"], "IMG_SIZE": 64}
    keys |= {"DROP_PATH": 0.3, "DROPOUT": 0.1}
    plain, recomputing = (
        encoder_from_keys({"ENCODER": keys, **PLAIN, "ACTIVATION_CHECKPOINT": on}) for on in (False, True)
    )
    recomputing.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    (expected, plain_saved), (found, saved) = gradients(plain, images), gradients(recomputing, images)
    torch.testing.assert_close(found, expected)
    assert saved < plain_saved / 2


@pytest.mark.parametrize("name", FAST_NAMES)
def test_an_exported_encoder_gives_the_same_maps(name: str) -> None:
    encoder, images = built(name), torch.randn(1, 3, 40, 72)
    exported = export(encoder, (images,)).module()
    again = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        torch.testing.assert_close(exported(again), encoder(again))


def test_an_exported_vit_takes_images_of_every_size_beyond_one_patch() -> None:
    encoder = built("vit_nano")
    sizes = ({0: Dim.STATIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported = export(encoder, (torch.randn(2, 3, 48, 80),), dynamic_shapes=sizes).module()
    for size in ((64, 64), (32, 96), (37, 49)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(exported(images), encoder(images))


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_encoder_gives_the_same_maps(name: str) -> None:
    torch._dynamo.reset()
    encoder, images = built(name), torch.randn(1, 3, 40, 72)
    compiled = torch.compile(encoder.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), encoder(images))


# Parameters of timm's models of the same shape, without a head.
@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("vit_small", {"patch_size": 16}, 21_665_664),
        ("vit_small", {"patch_size": 32}, 22_493_952),
        ("vit_small", {"patch_size": 4, "img_size": 32}, 21_338_496),
        ("vit_small", {"patch_size": 8, "img_size": 64}, 21_393_792),
        ("timm:vit_small_patch16_224", {}, 21_665_664),
        ("swin_tiny", {}, 27_519_354),
        ("swin_tiny", {"img_size": 64}, 27_519_354),
    ],
)
def test_parameter_counts(name: str, arguments: dict[str, int], count: int) -> None:
    assert sum(p.numel() for p in build_encoder(name, **arguments).parameters()) == count


def test_a_vit_without_position_embedding_is_permutation_equivariant() -> None:
    encoder = build_encoder("vit_nano", patch_size=4, img_size=16, pos_embed=False).eval()
    patches = torch.randn(1, 3, 4, 4, 4, 4)  # channel, row, y, column, x
    order = torch.randperm(16)
    cells = patches.permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 3, 4, 4)
    shuffled = cells[:, order].reshape(1, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5)
    with torch.no_grad():
        straight = encoder.tokens(patches.reshape(1, 3, 16, 16))
        permuted = encoder.tokens(shuffled.reshape(1, 3, 16, 16))
    torch.testing.assert_close(permuted, straight[:, order], atol=1e-4, rtol=1e-4)


def test_positions_are_resampled_for_larger_images() -> None:
    encoder = build_encoder("vit_nano", patch_size=4, img_size=16).eval()
    with torch.no_grad():
        assert encoder.tokens(torch.randn(1, 3, 20, 12)).shape == (1, 15, 128)


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(UserError, match="did you mean 'vit_small'"):
        build_encoder("vit_smal")
    with pytest.raises(UserError, match="model of that name is 'timm:vit_base_patch16_224'"):
        build_encoder("vit_base_patch16_224")
    with pytest.raises(UserError, match="did you mean 'vit_base_patch16_224'"):
        build_encoder("timm:vit_bas_patch16_224")
    with pytest.raises(UserError, match=r"maxvit_tiny_rw_224.*MaxxVit.*choose a vit_"):
        build_encoder("timm:maxvit_tiny_rw_224")
    with pytest.raises(UserError, match=r"vit_base_r50_s16_224.*hybrid"):
        build_encoder("timm:vit_base_r50_s16_224")
    with pytest.raises(UserError, match="family of encoders 'tim'"):
        build_encoder("tim:test_vit")
    with pytest.raises(UserError, match="did you mean 'patch_size'"):
        build_encoder("vit_nano", patchsize=4)
    with pytest.raises(UserError, match=r"IMG_SIZE 30.*PATCH_SIZE 16"):
        encoder_from_keys({"ENCODER": {"NAME": "vit_nano", "IMG_SIZE": 30, "PATCH_SIZE": 16}, **PLAIN})


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "swin_tiny"])
def test_class_tokens_have_the_authors_initialisation(name: str) -> None:
    """A truncated normal of standard deviation 0.02 (models/backbones/vit.py, t2t.py)."""
    encoder = build_encoder(name)
    (token,) = (parameter for key, parameter in encoder.named_parameters() if key.endswith("cls_token"))
    assert token.std().item() == pytest.approx(0.02, rel=0.25)
