"""ViTs with rotary positions, compared with timm's forward pass, and their windows with masked global attention."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from relvit_d2.encoders import build_encoder
from relvit_d2.encoders.eva import EvaViT, rotary_attention
from relvit_d2.encoders.timm_vit import without_head
from relvit_d2.encoders.vit import vit_builder
from relvit_d2.engine.optimizer import build_optimizer
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError

PATCH, SIDE = 16, 64  # pixels; 4 x 4 patches
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 2}
SHARED: dict[str, Any] = {"num_kv_heads": 1}  # queries of several heads share keys

# DINOv3; EVA-02, with absolute positions, SwiGLU, and in larger models a norm in it; CLIP with a norm after attention;
# learnt frequencies, with absolute positions too; no class token; Perception Encoder, columns first; grouped queries.
MODELS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3_qkvb": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": {},
    "eva02_base_patch16_clip_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_base_patch16_sapiens2": SHARED,
    "eva_giant_patch14_224": {},
}
WINDOWED = [name for name, extra in MODELS.items() if extra is not SHARED]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small(model: str, **arguments: Any) -> Any:
    """Build an encoder of three blocks in which no parameter is 0 or 1."""
    make = partial(without_head, model, **SMALL, **MODELS[model])
    encoder = vit_builder(make, EvaViT)(
        **({"patch_size": PATCH, "img_size": SIDE, "global_blocks": 0} | arguments)
    ).eval()
    for value in encoder.parameters():
        value.data.add_(0.3 * torch.randn_like(value))
    return encoder


def reference(model: str, encoder: Any, **arguments: Any) -> Any:
    """Build timm's model with the weights of ``encoder``."""
    keys: dict[str, Any] = {"img_size": SIDE, "patch_size": PATCH, "num_classes": 0, "global_pool": ""}
    keys |= {"use_fc_norm": False, "use_post_transformer_norm": not isinstance(encoder.vit.norm, nn.Identity)}
    found: Any = timm.create_model(model, **keys, **SMALL, **MODELS[model], **arguments).eval()
    found.load_state_dict(encoder.vit.state_dict())
    return found


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("size", "dynamic"), [((64, 64), False), ((96, 48), True), ((50, 120), True)])
def test_features_and_gradients_equal_timms(model: str, size: tuple[int, int], dynamic: bool) -> None:
    encoder = small(model)
    theirs = reference(model, encoder, dynamic_img_size=dynamic, dynamic_img_pad=dynamic)
    images = torch.randn(2, 3, *size)
    sequence = theirs.forward_features(images)
    pooled, found = encoder.pooled_features(images)
    expected = sequence[:, theirs.num_prefix_tokens :]
    close(found, expected)
    close(pooled, expected.mean(1) if theirs.cls_token is None else sequence[:, 0])
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: value.grad for name, value in theirs.named_parameters()}
    for name, value in encoder.vit.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-3, atol=1e-4 * gradients[name].abs().max())


def masked(encoder: Any, images: Tensor, mask: Tensor) -> Tensor:
    """Run timm's blocks with the mask ``(N, N)`` of the pairs that attend to each other; return all tokens."""
    rotations = encoder._rotations(encoder.grid(*images.shape[-2:]), None)
    x = encoder.embed(images)
    for block, rotation in zip(encoder.vit.blocks, rotations, strict=True):
        x = block(x, rope=rotation, attn_mask=mask)
    return encoder.vit.norm(x)


@pytest.mark.parametrize("model", WINDOWED)
def test_windows_are_global_attention_with_a_mask(model: str) -> None:
    """So each patch has the position that it has in the image, not in its window."""
    encoder = small(model, window=3)
    images, prefix = torch.randn(2, 3, 96, 144), encoder.prefix
    rows, cols = torch.arange(6) // 3, torch.arange(9) // 3
    window = (3 * rows[:, None] + cols).flatten()
    allowed = torch.ones(prefix + 54, prefix + 54, dtype=torch.bool)
    allowed[prefix:, prefix:] = window[:, None] == window
    close(encoder.tokens(images), masked(encoder, images, allowed)[:, prefix:])


@pytest.mark.parametrize("model", ["vit_small_plus_patch16_dinov3_qkvb", "vit_pe_core_tiny_patch16_384"])
def test_incomplete_windows_are_padded_with_projected_zeros(model: str) -> None:
    """As in ViTs without rotary positions; the padding is not rotated."""
    encoder = small(model, window=3)
    attention = encoder.vit.blocks[0].attn
    x, prefix = torch.randn(1, encoder.prefix + 20, SMALL["embed_dim"]), encoder.prefix
    rotation = torch.zeros(36, 2 * attention.head_dim)
    rotation[:, attention.head_dim :] = 1  # cosine of no rotation
    inside = (torch.arange(6)[:, None] < 4) & (torch.arange(6) < 5)
    rotation[inside.flatten()] = encoder._rotations((4, 5), None)[0]
    padded = torch.zeros(1, 36, x.shape[2]).masked_scatter(inside.flatten()[:, None], x[:, prefix:])
    window = (torch.arange(36) // 18 * 2 + torch.arange(36) % 6 // 3).flatten()
    allowed = torch.ones(prefix + 36, prefix + 36, dtype=torch.bool)
    allowed[prefix:, prefix:] = window[:, None] == window
    allowed[:prefix, prefix:] = inside.flatten()
    expected = attention(torch.cat((x[:, :prefix], padded), 1), rope=rotation, attn_mask=allowed)
    kept = torch.cat((torch.ones(prefix, dtype=torch.bool), inside.flatten()))
    found = rotary_attention(attention, x, encoder._rotations((4, 5), None)[0], (4, 5), 3)
    close(found, expected[:, kept])


@pytest.mark.parametrize("model", MODELS)
def test_patches_of_a_subset_keep_their_positions(model: str) -> None:
    """The tokens are those of the whole image if no token attends to the others."""
    encoder = small(model)
    images, prefix = torch.randn(2, 3, 64, 96), encoder.prefix
    kept = torch.rand(2, 24).argsort(1)[:, :7]
    found = encoder.tokens(images, kept)
    for image, indices, tokens in zip(images, kept, found, strict=True):
        allowed = torch.zeros(prefix + 24, dtype=torch.bool)
        allowed[:prefix] = allowed[prefix + indices] = True
        close(tokens, masked(encoder, image[None], allowed.expand(prefix + 24, -1))[0, prefix + indices])


@pytest.mark.parametrize("model", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_blocks_that_are_recomputed_or_selected_give_the_same_features(model: str) -> None:
    encoder, images = small(model, window=3, global_blocks=1, drop_path=0.3), torch.randn(2, 3, 64, 96)

    def trained() -> dict[str, Tensor]:
        torch.manual_seed(1)
        encoder.zero_grad()
        encoder.train().tokens(images).square().sum().backward()
        return {name: value.grad.clone() for name, value in encoder.named_parameters()}

    expected, features = trained(), encoder.eval().tokens(images)
    encoder.select_blocks(3)
    encoder.checkpoint_blocks()
    torch.testing.assert_close(trained(), expected)
    maps = encoder.eval()(images)
    assert list(maps) == ["b1", "b2", "s16"]
    torch.testing.assert_close(maps["s16"].flatten(2).mT, features)


def test_rotary_positions_are_position_information_without_the_position_embedding() -> None:
    for model in ("vit_small_patch16_dinov3", "eva02_tiny_patch14_224"):
        encoder = small(model, pos_embed=False)
        assert encoder.has_position_information and encoder.vit.pos_embed is None
        image = torch.randn(1, 3, SIDE, SIDE)
        moved, tokens = image.roll(PATCH, 3), encoder(image)["s16"]
        assert not torch.allclose(encoder(moved)["s16"], tokens.roll(1, 3), atol=1e-2)
    assert not small("eva_giant_patch14_224", pos_embed=False).has_position_information


def test_frequencies_and_biases_have_no_weight_decay_of_matrices() -> None:
    cfg = load_config("configs/demo/ssl_streets.yaml", ["SOLVER.WEIGHT_DECAY_BIAS", "0.0"], "pretrain")
    for model in ("eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_ape_224"):
        encoder = small(model)
        groups = build_optimizer(cfg, encoder).param_groups
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        without = {name.rpartition(".")[2] for name, p in encoder.named_parameters() if not decays[id(p)]}
        assert {"pos_embed", "cls_token"} < without
        assert ({"q_bias", "v_bias"} if model.startswith("eva02") else {"freqs"}) < without
        assert all(decays[id(p)] for name, p in encoder.named_parameters() if name.endswith("fc2.weight"))


def test_layers_of_the_learning_rate() -> None:
    encoder = small("vit_small_patch16_rope_mixed_ape_224")
    depths = {name: encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    assert {name for name, depth in depths.items() if depth == 0} == {
        *(f"vit.{name}" for name in ("cls_token", "pos_embed", "rope.freqs")),
        *(f"vit.patch_embed.proj.{name}" for name in ("weight", "bias")),
    }
    assert depths["vit.blocks.2.gamma_1"] == 3 and depths["vit.norm.weight"] == 4


def test_training_draws_no_random_positions() -> None:
    """timm scales the positions of Sapiens2 at random, once a batch."""
    encoder = small("vit_base_patch16_sapiens2").train()
    assert torch.equal(*(encoder._rotations((4, 4), None)[0] for _ in range(2)))
    theirs: Any = timm.create_model("vit_base_patch16_sapiens2", **SMALL, **SHARED).train()
    assert not torch.equal(*(theirs.rope.get_embed(shape=(4, 4)) for _ in range(2)))


def test_unsupported_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"REL_POS: .* has no option for relative positions; set it to False"):
        small("vit_small_patch16_dinov3", rel_pos=True)
    with pytest.raises(UserError, match=r"supports neither windows .*WINDOW 0"):
        small("vit_base_patch16_sapiens2", window=3)
    with pytest.raises(UserError, match=r"vit_relpos_base_patch16_224.*VisionTransformerRelPos.*not supported"):
        build_encoder("timm:vit_relpos_base_patch16_224")
