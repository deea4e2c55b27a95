"""Export of an encoder.safetensors to a file for timm or Detectron2."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import SwinTransformer
from detectron2.modeling.backbone.vit import ViT as Detectron2ViT
from safetensors.torch import save_file
from torch import Tensor, nn

from relvit_d2.conversion.convert import fold_scales
from relvit_d2.conversion.converted import checked_difference, random_image, relative_difference
from relvit_d2.conversion.encoder_file import build_described, read_encoder
from relvit_d2.conversion.reference_models import TIMM_NAMES
from relvit_d2.encoders import Encoder
from relvit_d2.encoders.eva import EvaViT
from relvit_d2.encoders.swin import Swin
from relvit_d2.encoders.timm_pyramid import TimmPyramid
from relvit_d2.encoders.vit import ViT
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing, check_target

# Image size at which every map is larger than a window: on smaller maps Detectron2 shifts windows, timm does not.
_SWIN_SIDE = 256


def _read(path: Path) -> Encoder:
    tensors, metadata = read_encoder(path)
    return build_described(path, tensors, metadata["encoder"]).eval()


def export_timm(source: Path, output: Path) -> str:
    """Write a file for timm; return the relative difference of the features and the code that loads it, as text."""
    check_target(output, ".safetensors")
    encoder = _read(source)
    name, arguments, tensors = to_timm(encoder)
    difference = verify_timm(encoder, name, arguments, tensors)
    with appearing(output) as part:
        save_file(tensors, str(part), {"architecture": name})
    call = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in arguments.items())])
    return (
        f"features of timm's model agree with the encoder's: relative difference {difference:.1e}\n"
        f"load with: model = timm.create_model({call})\n"
        f'           model.load_state_dict(safetensors.torch.load_file("{output}"))'
    )


def export_detectron2(source: Path, output: Path) -> str:
    """Write a checkpoint for Detectron2's ViT or SwinTransformer, standalone or as the backbone of a detector.

    Returns:
        The equal and the unequal features, and the code that loads the file, as text.
    """
    check_target(output, ".pth")
    exported = to_detectron2(_read(source))
    tensors = {name: value.detach().clone() for name, value in exported.backbone.state_dict().items()}
    # With matching_heuristics Detectron2 finds the backbone of a detector by the suffixes of names.
    with appearing(output) as part:
        torch.save({"model": tensors, "matching_heuristics": True}, part)
    return (
        f"equal (relative difference {exported.difference:.1e}): {exported.equal}\n"
        f"not equal: {exported.unequal}\n"
        f"load with: DetectionCheckpointer(model).load('{output}'), where model is a detector with this backbone, or\n"
        f"           {exported.call}"
    )


def to_timm(encoder: Encoder) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the name and the arguments of ``timm.create_model``, and the tensors that the model loads strictly.

    The model's ``forward_features`` returns the features of the encoder, in a ViT after the prefix tokens.

    Raises:
        UserError: if timm has no such model.
    """
    family, _, member = encoder.name.partition(":")
    name, arguments = (member, {}) if family == "timm" else TIMM_NAMES.get(encoder.name, ("", {}))
    relative = encoder.arguments.get("rel_pos")
    if isinstance(encoder, TimmPyramid):
        raise UserError(f"the weights of encoder '{encoder.name}' cannot be exported: export a ViT or a Swin")
    if not name or relative:
        raise UserError(
            f"timm {timm.__version__} has no model of encoder '{encoder.name}'"
            f"{' with relative positions' * bool(relative)}; it cannot load its weights"
        )
    config = encoder.arguments
    arguments = {"num_classes": 0, "in_chans": config["in_chans"], **arguments}
    if isinstance(encoder, ViT):
        arguments |= {"img_size": config["img_size"], "patch_size": config["patch_size"], "global_pool": ""}
        rotary = isinstance(encoder, EvaViT)
        without: dict[str, Any] = {"use_abs_pos_emb": False} if rotary else {"pos_embed": "none"}
        arguments |= {} if config["pos_embed"] else without
        if isinstance(encoder.vit.norm, nn.Identity):
            arguments["use_post_transformer_norm" if rotary else "final_norm"] = False
        arguments |= {"use_fc_norm": False} if rotary else {}
        tensors = encoder.vit.state_dict()
    else:
        assert isinstance(encoder, Swin)
        tensors = encoder.swin.state_dict()
    return name, arguments, {key: value.detach().clone() for key, value in tensors.items()}


@torch.no_grad()
def verify_timm(encoder: Encoder, name: str, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> float:
    """Load ``tensors`` strictly into timm's model, compare the features of an image, return the relative difference.

    Raises:
        UserError: if they differ.
    """
    model: Any = timm.create_model(name, **arguments).eval()
    model.load_state_dict(tensors)
    image = random_image(arguments.get("img_size", 224), arguments["in_chans"])
    features = model.forward_features(image)
    theirs = features[:, model.num_prefix_tokens :] if isinstance(encoder, ViT) else features.flatten(1, 2)
    return _checked(theirs, encoder.eval().tokens(image), f"timm's {name}")


def _checked(features: Tensor, expected: Tensor, model: str) -> float:
    return checked_difference(features, expected, f"{model} differ from the encoder's", "nothing is written")


@dataclass
class Detectron2Export:
    """A Detectron2 backbone with the weights of an encoder.

    Attributes:
        backbone: the backbone, in evaluation mode.
        call: the code that builds it.
        difference: relative difference of the equal features.
        equal: description of the features that are equal to the encoder's.
        unequal: description of the other differences.
    """

    backbone: Backbone
    call: str
    difference: float
    equal: str
    unequal: str


def to_detectron2(encoder: Encoder) -> Detectron2Export:
    """Build a Detectron2 backbone with the weights of ``encoder``, and compare their features.

    Raises:
        UserError: if Detectron2 has no such backbone, or features differ that should be equal.
    """
    encoder.eval()
    if isinstance(encoder, ViT) and not isinstance(encoder, EvaViT):
        return _vit(encoder)
    if isinstance(encoder, Swin):
        return _swin(encoder)
    raise UserError(f"Detectron2 has no backbone like encoder '{encoder.name}', only ViT and SwinTransformer")


@torch.no_grad()
def _vit(encoder: ViT) -> Detectron2Export:
    """Export to Detectron2's ViT, which has no class token and no final norm (``modeling/backbone/vit.py``)."""
    vit, config = encoder.vit, encoder.arguments
    tensors = fold_scales(vit.state_dict())
    left_out = ("cls_token", "reg_token", "norm.weight", "norm.bias")
    kept = {name: value for name, value in tensors.items() if name not in left_out}
    # Detectron2's ViT skips the first position, which belongs to the class token.
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
    backbone = Detectron2ViT(**arguments, norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
    _fill(backbone, kept, encoder.name)
    image = random_image(config["img_size"], config["in_chans"])
    theirs = backbone(image)["last_feat"].flatten(2).mT
    x = vit.patch_embed(image).flatten(1, 2)
    if vit.pos_embed is not None:
        x = x + vit.pos_embed[:, vit.pos_embed.shape[1] - x.shape[1] :]
    difference = _checked(theirs, vit.blocks(vit.norm_pre(x)), "Detectron2's ViT")
    with_prefix = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))
    usual = vit.blocks(with_prefix)[:, vit.num_prefix_tokens :]
    missing = [name for name in ("cls_token", "reg_token", "norm") if any(n.startswith(name) for n in tensors)]
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return Detectron2Export(
        backbone,
        f"detectron2.modeling.backbone.vit.ViT({call}, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))",
        difference,
        "the patch tokens after the last block and before the final norm, without attention to other tokens",
        f"Detectron2's ViT has no {' and no '.join(missing)}: before the norm, the relative difference of its features "
        f"from the encoder's is {relative_difference(theirs, usual):.1e}"
        if missing
        else "nothing",
    )


def _heads(block: Any) -> int:
    attention = getattr(block, "attn", None)
    return int(getattr(attention, "num_heads", 1))


@torch.no_grad()
def _swin(encoder: Swin) -> Detectron2Export:
    """Export to Detectron2's Swin, with norms on all maps and downsampling at the end of a stage (``swin.py``)."""
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
    initial = {
        n: v for n, v in backbone.state_dict().items() if "index" in n or n.startswith(("norm0", "norm1", "norm2"))
    }
    _fill(backbone, initial | kept, encoder.name)
    image = random_image(_SWIN_SIDE, in_chans)
    theirs, ours = backbone(image), list(encoder(image).values())
    normed = [F.layer_norm(value.movedim(1, -1), value.shape[1:2]).movedim(-1, 1) for value in ours[:-1]]
    differences = [
        _checked(theirs[f"p{index}"], value, "Detectron2's SwinTransformer")
        for index, value in enumerate([*normed, ours[-1]])
    ]
    return Detectron2Export(
        backbone,
        f"detectron2.modeling.backbone.SwinTransformer(in_chans={in_chans})",
        max(differences),
        "the last map, if all maps are larger than a window of 7 cells",
        "Detectron2's Swin has norms (scale 1, shift 0) on the first three maps, which the encoder does not have",
    )


def _fill(backbone: Backbone, tensors: dict[str, Tensor], name: str) -> None:
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    different = [key for key in {**shapes, **tensors} if key not in tensors or shapes.get(key) != tensors[key].shape]
    if different:
        raise UserError(
            f"encoder '{name}' and Detectron2's backbone do not have the same tensors ({', '.join(different[:3])}): "
            "its weights cannot be exported"
        )
    backbone.load_state_dict(tensors)
