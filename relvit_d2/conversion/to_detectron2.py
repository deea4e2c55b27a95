"""An encoder as one of Detectron2's own backbones."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import SwinTransformer
from detectron2.modeling.backbone.vit import ViT as StockViT
from torch import Tensor, nn

from relvit_d2.conversion.convert import fold_scales
from relvit_d2.conversion.to_timm import compared
from relvit_d2.encoders import Encoder
from relvit_d2.encoders.swin import Swin
from relvit_d2.encoders.vit import ViT
from relvit_d2.utils.errors import UserError

_SWIN_SIDE = 256  # pixels: every map is larger than a window, below which Detectron2 shifts and the classifiers do not


@dataclass
class Stock:
    """Detectron2's backbone with the encoder's weights.

    Attributes:
        backbone: in evaluation mode.
        call: the code that builds it.
        difference: of the features that stay equal, relative to the largest.
        equal: which those are.
        unequal: what Detectron2's backbone leaves out or adds.
    """

    backbone: Backbone
    call: str
    difference: float
    equal: str
    unequal: str


def to_detectron2(encoder: Encoder) -> Stock:
    """Build Detectron2's backbone with the weights of ``encoder``, and prove what stays equal.

    Raises:
        UserError: if Detectron2 has no such backbone, or the features differ.
    """
    encoder.eval()
    if isinstance(encoder, ViT):
        return _vit(encoder)
    if isinstance(encoder, Swin):
        return _swin(encoder)
    raise UserError(f"Detectron2 has no backbone like encoder '{encoder.name}', only ViT and SwinTransformer")


@torch.no_grad()
def _vit(encoder: ViT) -> Stock:
    """Detectron2's ViT has neither class token nor final norm (``modeling/backbone/vit.py``)."""
    vit, config = encoder.vit, encoder.arguments
    tensors = fold_scales(vit.state_dict())
    left_out = ("cls_token", "reg_token", "norm.weight", "norm.bias")
    kept = {name: value for name, value in tensors.items() if name not in left_out}
    # In Detectron2's ViT the first position is the class token's, which it passes over.
    prefix = 0 if vit.no_embed_class or not vit.has_class_token else 1
    arguments = {
        "patch_size": config["patch_size"],
        "in_chans": config["in_chans"],
        "embed_dim": encoder.dim,
        "depth": encoder.depth,
        "num_heads": _heads(vit.blocks[0]),
        "mlp_ratio": kept["blocks.0.mlp.fc1.weight"].shape[0] / encoder.dim if "blocks.0.mlp.fc1.weight" in kept else 4,
        "use_abs_pos": config["pos_embed"],
        "pretrain_img_size": config["img_size"],
        "pretrain_use_cls_token": bool(prefix),
    }
    if config["pos_embed"]:
        grid = vit.patch_embed.num_patches
        kept["pos_embed"] = kept["pos_embed"][:, kept["pos_embed"].shape[1] - grid - prefix :]
    backbone = StockViT(**arguments, norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
    _fill(backbone, kept, encoder.name)
    side = config["img_size"]
    image = torch.randn(1, config["in_chans"], side, side, generator=torch.Generator().manual_seed(0))
    theirs = backbone(image)["last_feat"].flatten(2).mT
    x = vit.patch_embed(image).flatten(1, 2)
    if vit.pos_embed is not None:
        x = x + vit.pos_embed[:, vit.pos_embed.shape[1] - x.shape[1] :]
    difference = compared(vit.blocks(vit.norm_pre(x)), theirs, "Detectron2's ViT")
    with_prefix = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))
    usual = vit.blocks(with_prefix)[:, vit.num_prefix_tokens :]
    apart = ((usual - theirs).abs().max() / usual.abs().max()).item()
    gone = [name for name in ("cls_token", "reg_token", "norm") if any(n.startswith(name) for n in tensors)]
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return Stock(
        backbone,
        f"detectron2.modeling.backbone.vit.ViT({call}, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))",
        difference,
        "the patches' tokens after the last block, before the final norm, where no other tokens are attended to",
        f"Detectron2's ViT has no {' and no '.join(gone)}: before the norm its features are {apart:.1e} off the "
        "encoder's, relative to the largest"
        if gone
        else "nothing",
    )


def _heads(block: Any) -> int:
    attention = getattr(block, "attn", None)
    return int(getattr(attention, "num_heads", 1))


@torch.no_grad()
def _swin(encoder: Swin) -> Stock:
    """Detectron2's Swin norms each map, and halves a map at the end of a stage (``modeling/backbone/swin.py``)."""
    swin, in_chans = encoder.swin, encoder.arguments["in_chans"]
    backbone = SwinTransformer(in_chans=in_chans).eval()
    kept: dict[str, Tensor] = {}
    for name, value in swin.state_dict().items():
        parts = name.split(".")
        if parts[0] == "norm":
            parts[0] = f"norm{len(encoder.strides) - 1}"
        elif parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        kept[".".join(parts)] = value
    own = {n: v for n, v in backbone.state_dict().items() if "index" in n or n.startswith(("norm0", "norm1", "norm2"))}
    _fill(backbone, own | kept, encoder.name)
    image = torch.randn(1, in_chans, _SWIN_SIDE, _SWIN_SIDE, generator=torch.Generator().manual_seed(0))
    theirs, ours = backbone(image), list(encoder(image).values())
    difference = compared(ours[-1], theirs["p3"], "Detectron2's SwinTransformer")
    for index, value in enumerate(ours[:-1]):
        normed = F.layer_norm(value.movedim(1, -1), value.shape[1:2]).movedim(-1, 1)
        difference = max(difference, compared(normed, theirs[f"p{index}"], "Detectron2's SwinTransformer"))
    return Stock(
        backbone,
        f"detectron2.modeling.backbone.SwinTransformer(in_chans={in_chans})",
        difference,
        "the last map, wherever all maps are larger than a window of 7 cells",
        "Detectron2's Swin norms the first three maps too, with scales of 1 and shifts of 0, which the encoder lacks",
    )


def _fill(backbone: Backbone, tensors: dict[str, Tensor], name: str) -> None:
    own = {key: value.shape for key, value in backbone.state_dict().items()}
    odd = [key for key in {**own, **tensors} if key not in tensors or own.get(key) != tensors[key].shape]
    if odd:
        raise UserError(
            f"encoder '{name}' has parts that Detectron2's backbone lacks, or lacks some of its "
            f"({', '.join(odd[:3])}): its weights cannot go there"
        )
    backbone.load_state_dict(tensors)
