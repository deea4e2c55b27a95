"""Reference implementations of models of other projects, to compare encoders with; from timm where it has them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import eva, swin_transformer, vision_transformer
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from relvit_d2.encoders.swin import SWIN_SIZES
from relvit_d2.encoders.timm_vit import is_eva, without_head

# Maps images (B, C, H, W) to features of the last map (B, N, D).
Reference = Callable[[Tensor], Tensor]

# timm's name of each encoder, and the arguments that differ from those of the name.
TIMM_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_nano": ("vit_tiny_patch16_224", {"embed_dim": 128, "depth": 4, "num_heads": 4}),
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {}),
    "vit_base": ("vit_base_patch16_224", {}),
    "swin_tiny": ("swin_tiny_patch4_window7_224", {}),
    **{f"swin:{size}": (f"swin_{size}_patch4_window7_224", {}) for size in SWIN_SIZES},
}


def timm_vit_reference(model: str, tensors: Mapping[str, Tensor], **arguments: Any) -> Reference:
    """Return timm's ViT ``model`` with tensors under the names of their authors.

    Raises:
        RuntimeError: if a tensor of the model is missing or a tensor is unexpected.
    """
    vit = without_head(model, **arguments).eval()
    # strict loading of the names as translated by timm
    if is_eva(model):
        translated = eva.checkpoint_filter_fn(dict(tensors), vit)
    else:
        translated = vision_transformer.checkpoint_filter_fn(dict(tensors), vit, adapt_layer_scale=True)
    vit.load_state_dict(translated)
    return lambda images: vit.forward_features(images)[:, vit.num_prefix_tokens :]


def timm_swin_reference(tensors: Mapping[str, Tensor], in_chans: int) -> Reference:
    """Return timm's Swin-T for images of 224 x 224, like :func:`timm_vit_reference`."""
    swin: Any = timm.create_model(TIMM_NAMES["swin_tiny"][0], in_chans=in_chans, num_classes=0).eval()
    swin.load_state_dict(swin_transformer.checkpoint_filter_fn(dict(tensors), swin))

    return lambda images: swin.forward_features(images).flatten(1, 2)


def timm_pyramid_reference(model: str, tensors: Mapping[str, Tensor]) -> Reference:
    """Return timm's ``model`` with maps of several strides with its tensors, like :func:`timm_vit_reference`."""
    net: Any = timm.create_model(model).eval()
    net.reset_classifier(0, "")
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})
    # The norm of the mean over the map of a ConvNeXt is part of the features.
    last = isinstance(net, ConvNeXt) and isinstance(net.norm_pre, nn.Identity)
    norm = net.head.norm if last else nn.Identity()

    def features(images: Tensor) -> Tensor:
        maps = net.forward_intermediates(images, norm=True, intermediates_only=True)
        return norm(maps[-1]).flatten(2).mT

    return features


def t2t_reference(tensors: Mapping[str, Tensor], heads: int) -> Reference:
    """Return T2T-ViT in plain tensor arithmetic, with explicit attention and the position table of the file.

    (yitu-opensource/T2T-ViT, ``models/t2t_vit.py`` and ``token_performer.py``)
    """
    depth = sum(name.endswith(".attn.qkv.weight") for name in tensors)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def performer(x: Tensor, name: str) -> Tensor:
        w = tensors[f"{name}.w"]
        keys, queries, values = linear(norm(x, f"{name}.norm1"), f"{name}.kqv").chunk(3, -1)
        features = [(t @ w.T - t.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w)) for t in (queries, keys)]
        weights = features[0] @ features[1].mT
        x = values + linear(weights @ values / (weights.sum(-1, keepdim=True) + 1e-8), f"{name}.proj")
        return x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.0")), f"{name}.mlp.2")

    def attention(x: Tensor, name: str) -> Tensor:
        batch, count, dim = x.shape
        q, k, v = linear(x, f"{name}.qkv").view(batch, count, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(dim // heads)).softmax(-1)
        return linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    def square(tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        return tokens.mT.unflatten(2, (side, side))

    def run(images: Tensor) -> Tensor:
        x = performer(F.unfold(images, 7, stride=4, padding=2).mT, "tokens_to_token.attention1")
        x = performer(F.unfold(square(x), 3, stride=2, padding=1).mT, "tokens_to_token.attention2")
        x = linear(F.unfold(square(x), 3, stride=2, padding=1).mT, "tokens_to_token.project")
        x = torch.cat((tensors["cls_token"].expand(len(x), -1, -1), x), 1) + tensors["pos_embed"]
        for block in (f"blocks.{index}" for index in range(depth)):
            x = x + attention(norm(x, f"{block}.norm1"), f"{block}.attn")
            hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            x = x + linear(hidden, f"{block}.mlp.fc2")
        return norm(x, "norm")[:, 1:]

    return run
