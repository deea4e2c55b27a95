"""Conversion of weights of other projects to encoders; each result is compared with the original model.

Names of tensors are those of facebookresearch/mae ``models_mae.py``, facebookresearch/dino ``vision_transformer.py``
and ``main_dino.py``, facebookresearch/dinov2 ``models/vision_transformer.py``, microsoft/Swin-Transformer
``models/swin_transformer.py``, yitu-opensource/T2T-ViT ``models/t2t_vit.py``, guglielmocamporese/relvit
``models/relvit.py``, lightly-ai/lightly-train ``_models/embedding_model.py`` and timm 1.0.31.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relvit_d2.conversion.checkpoint_file import FoundEncoder, read_file
from relvit_d2.conversion.converted import IMAGENET_PIXELS, Converted, pixel_metadata, verify
from relvit_d2.conversion.reference_models import (
    TIMM_NAMES,
    t2t_reference,
    timm_pyramid_reference,
    timm_swin_reference,
    timm_vit_reference,
)
from relvit_d2.encoders.base import Encoder, build_encoder
from relvit_d2.encoders.t2t import HEADS, sinusoid
from relvit_d2.encoders.timm_vit import is_eva
from relvit_d2.encoders.vit import SIZES
from relvit_d2.utils.errors import UserError, one_line

Tensors = dict[str, Tensor]

# Parts of a model after the encoder.
_HEADS = r"(head|head_dist|fc|fc_norm|attn_pool|pre_logits|decoder_\w+|decoder)(\.|$)|mask_token$"
# The heads of guglielmocamporese/relvit, models/relvit.py:40-52.
_RELVIT_HEADS = ("rel_head", "abs_pos_head", "dist_head", "angle_head", "clf_head")
# Patches per side of the images on which ViTs without position embedding are compared.
_DEFAULT_GRID = 14
# timm's names of models that this package has no name for, by family, width, depth and number of registers.
_LARGER = {
    ("mae", 1024, 24, 0): "vit_large_patch16_224",
    ("mae", 1280, 32, 0): "vit_huge_patch14_224",
    ("dinov2", 1024, 24, 0): "vit_large_patch14_dinov2",
    ("dinov2", 1536, 40, 0): "vit_giant_patch14_dinov2",
    ("dinov2", 384, 12, 4): "vit_small_patch14_reg4_dinov2",
    ("dinov2", 768, 12, 4): "vit_base_patch14_reg4_dinov2",
    ("dinov2", 1024, 24, 4): "vit_large_patch14_reg4_dinov2",
    ("dinov2", 1536, 40, 4): "vit_giant_patch14_reg4_dinov2",
}


def convert(found: FoundEncoder, kind: str | None = None) -> Converted:
    """Convert the tensors of a file to an encoder, and compare it with the original model.

    Args:
        kind: the family, a key of :data:`CONVERTERS`; None: detected from the names of the tensors.

    Raises:
        UserError: if the tensors do not belong to the family or fit no encoder, or the features differ.
    """
    kind = kind or detect(found)
    if kind not in CONVERTERS:
        raise UserError(f"weights of '{kind}' are not supported; supported are {', '.join(CONVERTERS)}")
    try:
        converted = CONVERTERS[kind](found)
    except (RuntimeError, LookupError, ValueError) as error:  # raised for missing or unexpected tensors
        reason = one_line(error, 200)
        raise UserError(
            f"'{found.path}' does not contain the tensors of a {kind} model ({reason}); give --from with the project "
            "that the file is from"
        ) from error
    converted.kind = kind
    verify(converted, found.path)
    if found.prefix:
        converted.notes.append(f"read from '{found.prefix}'")
    if found.other_prefixes:
        converted.notes.append(f"not read: {', '.join(map(repr, found.other_prefixes[:3]))}")
    return converted


def detect(found: FoundEncoder) -> str:
    """Return the family of the weights, from the names of the tensors.

    Encoders of MAE and DINO that were published without heads have timm's names and are converted as timm models.
    """
    if _relvit_heads(found):
        return "relvit"
    prefix = found.prefix
    if re.search(r"(embedding_model|model_wrapper|wrapped_model|_backbone\.)", prefix) or prefix.endswith("vit."):
        return "lightly"
    return _architecture(found.tensors) or ("dino" if re.search(r"(teacher|student)", prefix) else "timm")


def _architecture(names: Tensors) -> str | None:
    """Return the family that the names have without their prefix, None for timm's names."""
    if "tokens_to_token.project.weight" in names:
        return "t2t"
    if "layers.0.downsample.reduction.weight" in names:
        return "swin"
    if any(re.match(r"decoder_(embed|pos_embed|blocks)", name) for name in names):
        return "mae"
    if any(re.match(r"register_tokens|blocks\.\d+\.(\d+\.)?(ls1\.gamma|mlp\.w12)", n) for n in names):
        return "dinov2" if "mask_token" in names else None
    return None


def _encoder(name: str, tensors: Tensors, **arguments: Any) -> Encoder:
    encoder = build_encoder(name, **arguments)
    encoder.load_state_dict({key: value.float() for key, value in tensors.items()})
    return encoder.eval()


def _split(tensors: Tensors, heads: str = _HEADS) -> tuple[Tensors, list[str]]:
    """Return the encoder's tensors, and the names of those of the parts after it."""
    dropped = [name for name in tensors if re.match(heads, name)]
    return {name: value.float() for name, value in tensors.items() if name not in dropped}, dropped


def _grid(tensors: Tensors, prefix: int) -> int | None:
    """Return the side of the square grid of a position embedding after ``prefix`` entries, None if it is not square."""
    count = tensors["pos_embed"].shape[1] - prefix
    side = math.isqrt(max(count, 0))
    return side if side and side * side == count else None


def fold_scales(tensors: Tensors) -> Tensors:
    """Fold LayerScale into the preceding projections ``attn.proj`` and ``mlp.fc2``; the outputs stay the same."""
    folded = {}
    for name, value in tensors.items():
        if scale := re.fullmatch(r"(.*)(?:ls|gamma_)([12])(?:\.gamma)?", name):
            continue
        scale = re.fullmatch(r"(.*)(attn\.proj|mlp\.fc2)\.(weight|bias)", name)
        if scale:
            number = 1 if scale[2] == "attn.proj" else 2
            keys = (f"{scale[1]}ls{number}.gamma", f"{scale[1]}gamma_{number}")
            gamma = next((tensors[key] for key in keys if key in tensors), None)
            if gamma is not None:
                value = gamma[:, None] * value if scale[3] == "weight" else gamma * value
        folded[name] = value
    return folded


def timm_vit(
    found: FoundEncoder,
    kind: str = "timm",
    architecture: str | None = None,
    keep: bool = False,
    pixels: dict[str, Any] | None = None,
) -> Converted:
    """Convert a ViT with timm's names to the matching encoder (LayerScale folded) or else to ``timm:ARCHITECTURE``.

    Args:
        architecture: timm's name of the model; None: that in a ``config.json`` in the folder of the file.
        keep: always return ``timm:ARCHITECTURE``.
        pixels: metadata of the pixel statistics; None: those in ``config.json``.
    """
    tensors, dropped = _split(found.tensors, r"head(_dist)?\.|mask_token$" if architecture else _HEADS)
    config = {} if architecture else _timm_config(Path(found.path))
    architecture = architecture or config.get("architecture")
    weight = tensors["patch_embed.proj.weight"]
    width, in_chans, patch = int(weight.shape[0]), int(weight.shape[1]), int(weight.shape[-1])
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    positions = "pos_embed" in tensors
    if architecture:
        keep = keep or is_eva(architecture)
    elif not positions and any(name.endswith(".gamma_1") for name in tensors):
        # Rotary positions are not in the file, so it would be read as a ViT without positions.
        raise UserError(
            f"'{found.path}' contains a ViT that may have rotary positions: put timm's config.json, from its page "
            "on the Hugging Face Hub, into its folder, or load it with MODEL.WEIGHTS timm:NAME"
        )
    pixels = pixel_metadata(config.get("pretrained_cfg", {})) if pixels is None else pixels
    arguments: dict[str, Any] = {"patch_size": patch, "in_chans": in_chans, "pos_embed": positions}
    shared = {"patch_size": patch, "in_chans": in_chans} | ({} if positions else {"pos_embed": "none"})
    folded = {f"vit.{key}": value for key, value in fold_scales(tensors).items()}
    grid = _grid(tensors, 1) if positions else _DEFAULT_GRID
    for name, (dim, blocks, _) in SIZES.items():
        if keep or grid is None or (dim, blocks) != (width, depth):
            continue
        arguments["img_size"] = side = patch * grid
        ours = build_encoder(name, **arguments).state_dict()
        if {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in folded.items()}:
            model, dims = TIMM_NAMES[name]
            scaled = len(folded) != len(tensors)
            scale = {"init_values": 1.0} if scaled else {}
            reference = timm_vit_reference(model, tensors, img_size=side, **dims, **scale, **shared)
            notes = ["LayerScale folded into attn.proj and mlp.fc2"] if scaled else []
            return Converted(_encoder(name, folded, **arguments), kind, reference, side, dropped, notes, pixels)
    architecture = architecture or _LARGER.get((kind, width, depth, registers))
    if architecture is None:
        raise UserError(
            f"'{found.path}' contains an unknown ViT of {depth} blocks of width {width} (known: {', '.join(SIZES)}): "
            "put timm's config.json into its folder, or load it with MODEL.WEIGHTS timm:NAME"
        )
    model = f"timm:{architecture}"
    kept = {name: value for name, value in tensors.items() if not re.match(r"(fc_norm|attn_pool)\.", name)}
    dropped += [name for name in tensors if name not in kept]
    if positions:
        slots = build_encoder(model, patch_size=patch, img_size=patch).state_dict()["vit.pos_embed"].shape[1]
        grid = _grid(tensors, slots - 1)
        if grid is None:
            raise UserError(f"'{found.path}' has a position embedding of a grid that is not square: not supported")
    arguments["img_size"] = side = patch * (grid or _DEFAULT_GRID)
    encoder = _encoder(model, {f"vit.{key}": value for key, value in kept.items()}, **arguments)
    reference = timm_vit_reference(architecture, kept, img_size=side, **shared)
    return Converted(encoder, kind, reference, side, dropped, pixels=pixels)


def _timm_config(path: Path) -> dict[str, Any]:
    """Return timm's ``config.json`` in the folder of a file, empty if there is none."""
    file = path.parent / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and isinstance(config.get("architecture"), str) else {}


def timm(found: FoundEncoder) -> Converted:
    """Convert a ViT or a Swin-T with timm's names."""
    is_swin = "layers.0.blocks.0.attn.relative_position_bias_table" in found.tensors
    return swin(found) if is_swin else timm_vit(found)


def dinov2(found: FoundEncoder) -> Converted:
    """Convert a ViT of DINOv2; with registers, the position embedding of the class token is added to the token."""
    tensors = {}
    for name, value in found.tensors.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # blocks in chunks keep their index
        name = name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")
        tensors[name] = value
    original = tensors | {"mask_token": torch.zeros(1, 1)}
    if "register_tokens" in tensors:
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    converted = timm_vit(replace(found, tensors=tensors), "dinov2", pixels=IMAGENET_PIXELS)
    if "register_tokens" in original:
        # timm translates the original names itself if there is a mask token.
        model = converted.encoder.name.removeprefix("timm:")
        shared = {key: converted.encoder.arguments[key] for key in ("patch_size", "in_chans")}
        floats = {name: value.float() for name, value in original.items()}
        converted.reference = timm_vit_reference(model, floats, img_size=converted.side, **shared)
    return converted


def swin(found: FoundEncoder) -> Converted:
    """Convert a Swin-T; the authors downsample at the end of a stage, timm at the beginning of the next one."""
    tensors, dropped = _split(found.tensors, _HEADS + r"|.*(relative_position_index|attn_mask)$")
    at_end = "layers.0.downsample.reduction.weight" in tensors

    def renamed(name: str) -> str:
        if at_end and (match := re.match(r"layers\.(\d+)\.downsample\.(.*)", name)):
            return f"swin.layers.{int(match[1]) + 1}.downsample.{match[2]}"
        return f"swin.{name}"

    weight = tensors["patch_embed.proj.weight"]
    in_chans = int(weight.shape[1])
    depths = tuple(
        1 + max(int(n.split(".")[3]) for n in tensors if n.startswith(f"layers.{i}.blocks.")) for i in range(4)
    )
    window = tensors["layers.0.blocks.0.attn.relative_position_bias_table"].shape[0]
    if (weight.shape[0], depths, weight.shape[-1], window) != (96, (2, 2, 6, 2), 4, 169):
        raise UserError(
            f"'{found.path}' contains a Swin of width {weight.shape[0]}, {depths} blocks and windows of "
            f"{(math.isqrt(window) + 1) // 2}; only Swin-T is supported: width 96, (2, 2, 6, 2) blocks, windows of 7"
        )
    encoder = _encoder("swin_tiny", {renamed(k): v for k, v in tensors.items()}, patch_size=4, in_chans=in_chans)
    reference = timm_swin_reference(tensors, in_chans)
    return Converted(encoder, "swin", reference, 224, dropped, pixels=IMAGENET_PIXELS)


def timm_pyramid(found: FoundEncoder, architecture: str) -> Converted:
    """Convert a model of timm with maps of several strides, for images of three channels, to ``timm:ARCHITECTURE``."""
    ours = build_encoder(f"timm:{architecture}").state_dict()
    names = {name: f"net.{name}" for name in found.tensors}
    if "norm.weight" in ours:  # a ConvNeXt that norms the mean over the map
        names |= {f"head.norm.{part}": f"norm.{part}" for part in ("weight", "bias")}
    renamed = {names[name]: value for name, value in found.tensors.items() if names[name] in ours}
    dropped = [name for name in found.tensors if names[name] not in ours]
    encoder = _encoder(f"timm:{architecture}", renamed)
    return Converted(encoder, "timm", timm_pyramid_reference(architecture, found.tensors), 224, dropped)


def t2t(found: FoundEncoder) -> Converted:
    """Convert a T2T-ViT-14 with performers, whose position table must be the sinusoid of the encoder."""
    tensors, dropped = _split(found.tensors)
    table = tensors["pos_embed"]
    side = (_grid(tensors, 1) or _DEFAULT_GRID) * 16
    expected = sinusoid(table.shape[1], table.shape[2])
    if not torch.allclose(table[0].double(), expected, atol=1e-5, rtol=0):
        raise UserError(f"the position table of '{found.path}' is not T2T-ViT's sinusoid, which is not supported")
    kept = {name: value for name, value in tensors.items() if name != "pos_embed"}
    in_chans = tensors["tokens_to_token.attention1.kqv.weight"].shape[1] // 49
    encoder = _encoder("t2t_vit_14", kept, img_size=side, in_chans=in_chans)
    notes = ["the position table is computed for each image size"]
    reference = t2t_reference(tensors, HEADS)
    return Converted(encoder, "t2t", reference, side, [*dropped, "pos_embed"], notes, IMAGENET_PIXELS)


def relvit(found: FoundEncoder) -> Converted:
    """Convert a Lightning checkpoint of RelViT's authors: the backbone without the heads.

    Their pre-training does not use the position embedding of a ViT (``models/backbones/vit.py:231``;
    ``scripts/upstream.sh``), so the file has its random initial values. It is dropped if Adam has no state for it, or,
    without optimizer states in the file, if there are heads but no classifier.
    """
    heads = _relvit_heads(found)
    notes = [f"heads of pretext tasks and classifier dropped: {', '.join(heads)}"] if heads else []
    tensors = dict(found.tensors)
    if not (kind := _architecture(tensors)):
        trained = _trained_positions(Path(found.path))
        if trained is None:
            trained = "clf_head" in heads or not heads
        if not trained:
            del tensors["pos_embed"]
            notes.append("pos_embed dropped: not used in pre-training")
    converted = CONVERTERS[kind or "timm"](replace(found, tensors=tensors))
    converted.pixels = {}  # those of the training data set, which is unknown
    converted.notes = notes + converted.notes
    return converted


def _relvit_heads(found: FoundEncoder) -> list[str]:
    parent = found.prefix.removesuffix("backbone.")
    return [head for head in _RELVIT_HEADS if any(name.startswith(f"{parent}{head}.") for name in found.other_tensors)]


def _trained_positions(path: Path) -> bool | None:
    """Return whether the optimizer has a state for parameter 1, the position embedding; None without states."""
    states = read_file(path).get("optimizer_states")
    if isinstance(states, list) and states and isinstance(state := states[0].get("state"), dict) and state:
        return 1 in state
    return None


def lightly(found: FoundEncoder) -> Converted:
    """Convert a model of Lightly's packages: timm's, DINOv2's or Swin's names inside their wrappers."""
    converted = CONVERTERS[_architecture(found.tensors) or "timm"](found)
    converted.pixels = {}
    return converted


CONVERTERS: dict[str, Callable[[FoundEncoder], Converted]] = {
    "timm": timm,
    "mae": partial(timm_vit, kind="mae", pixels=IMAGENET_PIXELS),
    "dino": partial(timm_vit, kind="dino", pixels=IMAGENET_PIXELS),
    "dinov2": dinov2,
    "swin": swin,
    "t2t": t2t,
    "relvit": relvit,
    "lightly": lightly,
}
