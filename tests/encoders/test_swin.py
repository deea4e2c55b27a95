"""Swin, compared with a dense version, with timm at 224 pixels and with Detectron2 at larger sizes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.swin import SwinTransformer as Detectron2Swin
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import Tensor

from relvit_d2.detection.backbone import NormedMaps
from relvit_d2.encoders import build_encoder, encoder_from_keys
from relvit_d2.encoders.swin import Swin
from relvit_d2.utils.errors import UserError


def enlarge_weights(encoder: Swin) -> Swin:
    """Make attention and biases large enough to affect the features."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if "norm" not in name:
                value.normal_(std=0.1 if value.ndim > 1 else 0.3, generator=generator)
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder() -> Swin:
    encoder = build_encoder("swin_tiny", img_size=32)
    assert isinstance(encoder, Swin)
    return enlarge_weights(encoder)


def dense(swin: Any, image: Tensor) -> Tensor:
    """Run the single stage of ``swin`` with attention between all tokens of the padded map, masked to windows."""
    x = swin.patch_embed(image[None])[0]
    for index, block in enumerate(swin.layers[0].blocks):
        height, width = x.shape[:2]
        y = F.pad(block.norm1(x), (0, 0, 0, -width % 7, 0, -height % 7))
        rows, cols = y.shape[:2]
        row, col = torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)
        first = [3 if index % 2 and side > 7 else 0 for side in (height, width)]
        window = torch.stack(((row - first[0]) // 7, (col - first[1]) // 7), 1)
        apart = (window[:, None] != window).any(2)
        down, right = ((place[:, None] - place).clamp(-6, 6) + 6 for place in (row, col))
        q, k, v = block.attn.qkv(y).flatten(0, 1).unflatten(1, (3, block.attn.num_heads, -1)).unbind(1)
        scores = torch.einsum("ihd,jhd->ijh", q, k) / math.sqrt(q.shape[-1])
        scores = scores + block.attn.relative_position_bias_table[13 * down + right]
        weights = scores.masked_fill(apart[..., None], -math.inf).softmax(1)
        y = block.attn.proj(torch.einsum("ijh,jhd->ihd", weights, v).flatten(1)).view(rows, cols, -1)
        x = x + y[:height, :width]
        x = x + block.mlp(block.norm2(x))
    return swin.norm(x).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(28, 28), (20, 33), (60, 44), (4, 64)])
def test_windows_equal_the_dense_version(size: tuple[int, int]) -> None:
    """Shifts only along axes longer than a window; no attention between opposite edges."""
    encoder = enlarge_weights(Swin(12, (2,), (3,), patch_size=4, drop_path=0.0, dropout=0.0, in_chans=3))
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    padded = F.pad(image, (0, -size[1] % 4, 0, -size[0] % 4))
    with torch.no_grad():
        torch.testing.assert_close(encoder(image[None])["s4"][0], dense(encoder.swin, padded), rtol=1e-4, atol=1e-5)


def test_img_size_and_pos_embed_have_no_effect(encoder: Swin) -> None:
    again = build_encoder("swin_tiny", img_size=224, pos_embed=False).eval()
    again.load_state_dict(encoder.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(again.tokens(image), encoder.tokens(image))


def test_another_patch_size_is_rejected() -> None:
    keys = {"ENCODER": {"NAME": "swin_tiny", "PATCH_SIZE": 16}, "COMPILE": False, "ACTIVATION_CHECKPOINT": False}
    with pytest.raises(UserError, match=r"MODEL.ENCODER.PATCH_SIZE 16.*set it to 4"):
        encoder_from_keys(keys)


def test_features_equal_timms_at_224_pixels(encoder: Swin) -> None:
    """The last map is one window."""
    timms = TimmSwin(num_classes=0).eval()
    timms.load_state_dict(encoder.swin.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)["s32"], timms.forward_features(images).permute(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(256, 288), (261, 301)])
def test_features_equal_detectron2s_at_other_sizes(encoder: Swin, size: tuple[int, int]) -> None:
    """Every map is larger than a window; odd maps are padded; each map has its norm."""
    theirs, ours = Detectron2Swin(drop_path_rate=0.0).eval(), NormedMaps(encoder, list(encoder.strides)).eval()
    state = {}
    for name, value in encoder.swin.state_dict().items():
        stage, _, rest = name.removeprefix("layers.").partition(".")
        # In Detectron2 patch merging ends a stage, in timm it begins the next one; the last norm is numbered.
        state[f"layers.{int(stage) - 1}.{rest}" if rest.startswith("downsample") else name] = value
    state["norm3.weight"], state["norm3.bias"] = state.pop("norm.weight"), state.pop("norm.bias")
    for index, norm in enumerate(ours.norms.values()):
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        state |= {f"norm{index}.{name}": value for name, value in norm.state_dict().items()}
    absent = theirs.load_state_dict(state, strict=False)
    assert not absent.unexpected_keys
    assert all("relative_position_index" in name for name in absent.missing_keys)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(list(ours(images).values()), list(theirs(images).values()))
