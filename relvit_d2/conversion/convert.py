"""Other people's weights as encoders of this package, each proved against its source's definition.

Names of tensors are those of facebookresearch/mae ``models_mae.py``, facebookresearch/dino ``vision_transformer.py``
and ``main_dino.py``, facebookresearch/dinov2 ``models/vision_transformer.py``, microsoft/Swin-Transformer
``models/swin_transformer.py``, yitu-opensource/T2T-ViT ``models/t2t_vit.py``, guglielmocamporese/relvit
``models/relvit.py``, lightly-ai/lightly-train ``_models/embedding_model.py`` and timm 1.0.31.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relvit_d2.conversion.checkpoint_file import Found, read_file
from relvit_d2.conversion.converted import IMAGENET_PIXELS, Converted, pixels_of, prove
from relvit_d2.conversion.reference_models import (
    TIMM_NAMES,
    t2t_definition,
    timm_swin_definition,
    timm_vit_definition,
)
from relvit_d2.encoders.base import Encoder, build_encoder
from relvit_d2.encoders.t2t import HEADS, sinusoid
from relvit_d2.encoders.vit import SIZES
from relvit_d2.utils.errors import UserError

Tensors = dict[str, Tensor]

# What follows the encoder in a model and is no part of it.
_HEADS = r"(head|head_dist|fc|fc_norm|attn_pool|pre_logits|decoder_\w+|decoder)(\.|$)|mask_token$"
# The heads of guglielmocamporese/relvit, models/relvit.py:40-52.
_RELVIT_HEADS = ("rel_head", "abs_pos_head", "dist_head", "angle_head", "clf_head")
_PLAIN_GRID = 14  # patches a side of the images that a ViT without position embedding is proved on
# timm's names of models that this package has no name for, by family, width, blocks and registers.
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


def convert(found: Found, kind: str | None = None) -> Converted:
    """Make an encoder of what was found in a file, and prove it.

    Args:
        found: the encoder's tensors.
        kind: the family, a key of :data:`CONVERTERS`; None detects it by the names.

    Raises:
        UserError: if the tensors are not of the family or of no encoder that exists here, or the proof fails.
    """
    kind = kind or detect(found)
    if kind not in CONVERTERS:
        raise UserError(f"weights of '{kind}' are unknown; known are {', '.join(CONVERTERS)}")
    try:
        converted = CONVERTERS[kind](found)
    except (RuntimeError, LookupError, ValueError) as error:  # how modules refuse tensors of others
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"'{found.path}' does not hold the tensors of a model of {kind} ({reason}); say --from with what it is of"
        ) from error
    converted.kind = kind
    prove(converted, found.path)
    if found.place:
        converted.notes.append(f"read from '{found.place}'")
    if found.others:
        converted.notes.append(f"left unread: {', '.join(repr(other) for other in found.others[:3])}")
    return converted


def detect(found: Found) -> str:
    """Tell by the names of tensors whose weights they are.

    Encoders of MAE and DINO that were published alone have timm's names, and convert as timm's.
    """
    names, place = found.tensors, found.place
    if _relvit_heads(found):
        return "relvit"
    if re.search(r"(embedding_model|model_wrapper|wrapped_model|_backbone\.)", place) or place.endswith("vit."):
        return "lightly"
    return _inner(names) or ("dino" if re.search(r"(teacher|student)", place) else "timm")


def _inner(names: Tensors) -> str | None:
    if "tokens_to_token.project.weight" in names:
        return "t2t"
    if "layers.0.downsample.reduction.weight" in names:
        return "swin"
    if any(re.match(r"decoder_(embed|pos_embed|blocks)", name) for name in names):
        return "mae"
    if any(re.match(r"register_tokens|blocks\.\d+\.(\d+\.)?(ls1\.gamma|mlp\.w12)", n) for n in names):
        return "dinov2" if "mask_token" in names else None
    return None


def _filled(name: str, tensors: Tensors, **arguments: Any) -> Encoder:
    encoder = build_encoder(name, **arguments)
    encoder.load_state_dict({key: value.float() for key, value in tensors.items()})
    return encoder.eval()


def _split(tensors: Tensors, heads: str = _HEADS) -> tuple[Tensors, list[str]]:
    """Part the encoder's tensors from the names of what follows it."""
    dropped = [name for name in tensors if re.match(heads, name)]
    return {name: value.float() for name, value in tensors.items() if name not in dropped}, dropped


def _grid(tensors: Tensors, prefix: int) -> int | None:
    """Side of the square grid of a position embedding with ``prefix`` entries before it, None if it has none."""
    count = tensors["pos_embed"].shape[1] - prefix
    side = math.isqrt(max(count, 0))
    return side if side and side * side == count else None


def fold_scales(tensors: Tensors) -> Tensors:
    """Multiply LayerScale into the projection before it, ``attn.proj`` and ``mlp.fc2``; what comes out is the same."""
    folded = {}
    for name, value in tensors.items():
        if scale := re.fullmatch(r"(.*)(?:ls|gamma_)([12])(?:\.gamma)?", name):
            continue
        scale = re.fullmatch(r"(.*)(attn\.proj|mlp\.fc2)\.(weight|bias)", name)
        if scale:
            number = 1 if scale[2] == "attn.proj" else 2
            places = (f"{scale[1]}ls{number}.gamma", f"{scale[1]}gamma_{number}")
            gamma = next((tensors[place] for place in places if place in tensors), None)
            if gamma is not None:
                value = gamma[:, None] * value if scale[3] == "weight" else gamma * value
        folded[name] = value
    return folded


def timm_vit(found: Found, kind: str = "timm", architecture: str | None = None, keep: bool = False) -> Converted:
    """Convert a ViT with timm's names.

    It becomes the encoder of this package that it fits, with LayerScale folded, else ``timm:ARCHITECTURE``.

    Args:
        found: the tensors.
        kind: the family, for models that only its authors made.
        architecture: timm's name of the model; None: that of a ``config.json`` beside the file, as hubs have it.
        keep: take ``timm:ARCHITECTURE`` in any case.
    """
    tensors, dropped = _split(found.tensors, r"head(_dist)?\.|mask_token$" if architecture else _HEADS)
    config = {} if architecture else _config_beside(Path(found.path))
    architecture = architecture or config.get("architecture")
    weight = tensors["patch_embed.proj.weight"]
    width, in_chans, patch = int(weight.shape[0]), int(weight.shape[1]), int(weight.shape[-1])
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    positions = "pos_embed" in tensors
    arguments: dict[str, Any] = {"patch_size": patch, "in_chans": in_chans, "pos_embed": positions}
    shared = {"patch_size": patch, "in_chans": in_chans} | ({} if positions else {"pos_embed": "none"})
    folded = {f"vit.{key}": value for key, value in fold_scales(tensors).items()}
    grid = _grid(tensors, 1) if positions else _PLAIN_GRID
    for name, (dim, blocks, _) in SIZES.items():
        if keep or grid is None or (dim, blocks) != (width, depth):
            continue
        arguments["img_size"] = side = patch * grid
        ours = build_encoder(name, **arguments).state_dict()
        if {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in folded.items()}:
            model, dims = TIMM_NAMES[name]
            scaled = len(folded) != len(tensors)
            scale = {"init_values": 1.0} if scaled else {}
            definition = timm_vit_definition(model, tensors, img_size=side, **dims, **scale, **shared)
            notes = ["LayerScale folded into attn.proj and mlp.fc2"] if scaled else []
            return Converted(_filled(name, folded, **arguments), kind, definition, side, dropped, notes)
    architecture = architecture or _LARGER.get((kind, width, depth, registers))
    if architecture is None:
        raise UserError(
            f"'{found.path}' holds a ViT of {depth} blocks of width {width} that is none of "
            f"{', '.join(SIZES)} and does not say its name: put timm's config.json beside it, or load it by "
            "MODEL.WEIGHTS timm:NAME"
        )
    model = f"timm:{architecture}"
    kept = {name: value for name, value in tensors.items() if not re.match(r"(fc_norm|attn_pool)\.", name)}
    dropped += [name for name in tensors if name not in kept]
    if positions:
        slots = build_encoder(model, patch_size=patch, img_size=patch).state_dict()["vit.pos_embed"].shape[1]
        grid = _grid(tensors, slots - 1)
        if grid is None:
            raise UserError(f"'{found.path}' has positions for no square grid of patches: only square ones convert")
    arguments["img_size"] = side = patch * (grid or _PLAIN_GRID)
    encoder = _filled(model, {f"vit.{key}": value for key, value in kept.items()}, **arguments)
    definition = timm_vit_definition(architecture, kept, img_size=side, **shared)
    return Converted(encoder, kind, definition, side, dropped, pixels=pixels_of(config.get("pretrained_cfg", {})))


def _config_beside(path: Path) -> dict[str, Any]:
    beside = path.parent / "config.json"
    try:
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and isinstance(config.get("architecture"), str) else {}


def timm(found: Found) -> Converted:
    """Convert a ViT or a Swin-T with timm's names."""
    if "layers.0.blocks.0.attn.relative_position_bias_table" in found.tensors:
        return swin(found)
    converted = timm_vit(found)
    converted.pixels = converted.pixels or pixels_of(_config_beside(Path(found.path)).get("pretrained_cfg", {}))
    return converted


def mae(found: Found) -> Converted:
    """Convert a masked autoencoder: the decoder is dropped, the fixed position table kept as what it starts from."""
    converted = timm_vit(found, "mae")
    converted.pixels = IMAGENET_PIXELS
    return converted


def dino(found: Found) -> Converted:
    """Convert a ViT of DINO, the teacher where both are there."""
    converted = timm_vit(found, "dino")
    converted.pixels = IMAGENET_PIXELS
    return converted


def dinov2(found: Found) -> Converted:
    """Convert a ViT of DINOv2; its class token's position is added to the token where there are registers."""
    tensors = {}
    for name, value in found.tensors.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # chunks of blocks keep the whole row's numbers
        name = name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")
        tensors[name] = value
    straight = {name: value for name, value in tensors.items() if name != "mask_token"}
    if "register_tokens" in tensors:
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    place = Found(found.path, tensors, found.place, found.beside, found.others)
    converted = timm_vit(place, "dinov2")
    if "register_tokens" in straight:
        # timm's own translation of the original names, which it makes where the mask's token is
        model = converted.encoder.name.removeprefix("timm:")
        original = {"mask_token": torch.zeros(1, 1)} | {k: v.float() for k, v in straight.items()}
        side, arguments = converted.side, converted.encoder.arguments
        shared = {"patch_size": arguments["patch_size"], "in_chans": arguments["in_chans"]}
        converted.definition = timm_vit_definition(model, original, img_size=side, **shared)
    converted.pixels = IMAGENET_PIXELS
    return converted


def swin(found: Found) -> Converted:
    """Convert a Swin-T: its authors halve a map at the end of a stage, timm at the beginning of the next."""
    tensors, dropped = _split(found.tensors, _HEADS + r"|.*(relative_position_index|attn_mask)$")
    ended = "layers.0.downsample.reduction.weight" in tensors

    def renamed(name: str) -> str:
        if ended and (place := re.match(r"layers\.(\d+)\.downsample\.(.*)", name)):
            return f"swin.layers.{int(place[1]) + 1}.downsample.{place[2]}"
        return f"swin.{name}"

    weight = tensors["patch_embed.proj.weight"]
    in_chans = int(weight.shape[1])
    depths = tuple(
        1 + max(int(n.split(".")[3]) for n in tensors if n.startswith(f"layers.{i}.blocks.")) for i in range(4)
    )
    window = tensors["layers.0.blocks.0.attn.relative_position_bias_table"].shape[0]
    if (weight.shape[0], depths, weight.shape[-1], window) != (96, (2, 2, 6, 2), 4, 169):
        raise UserError(
            f"'{found.path}' holds a Swin of width {weight.shape[0]}, {depths} blocks and windows of "
            f"{(math.isqrt(window) + 1) // 2}: only Swin-T converts, of width 96, (2, 2, 6, 2) blocks and windows of 7"
        )
    encoder = _filled("swin_tiny", {renamed(k): v for k, v in tensors.items()}, patch_size=4, in_chans=in_chans)
    definition = timm_swin_definition(tensors, in_chans)
    return Converted(encoder, "swin", definition, 224, dropped, pixels=IMAGENET_PIXELS)


def t2t(found: Found) -> Converted:
    """Convert a T2T-ViT-14 with performers; its position table must be the sinusoid that ours is made by."""
    tensors, dropped = _split(found.tensors)
    table = tensors["pos_embed"]
    side = (_grid(tensors, 1) or _PLAIN_GRID) * 16
    expected = sinusoid(table.shape[1], table.shape[2])
    if not torch.allclose(table[0].double(), expected, atol=1e-5, rtol=0):
        raise UserError(f"the position table of '{found.path}' is not T2T-ViT's sinusoid, so it cannot be made anew")
    kept = {name: value for name, value in tensors.items() if name != "pos_embed"}
    in_chans = tensors["tokens_to_token.attention1.kqv.weight"].shape[1] // 49
    encoder = _filled("t2t_vit_14", kept, img_size=side, in_chans=in_chans)
    definition = t2t_definition(tensors, HEADS)
    return Converted(
        encoder, "t2t", definition, side, [*dropped, "pos_embed"], ["the position table is made anew for each size"],
        IMAGENET_PIXELS,
    )  # fmt: skip


def relvit(found: Found) -> Converted:
    """Convert a Lightning checkpoint of RelViT's authors: the backbone, without the heads.

    Their pre-training leaves the position embedding of a ViT out of the pass (``models/backbones/vit.py:231``;
    ``scripts/upstream.sh``), so it has its first random values in the file. Whether it took part the optimiser tells:
    Adam has no state for a parameter without gradient. Where that is not in the file, weights that no classifier was
    trained on count as pre-trained without.
    """
    heads = _relvit_heads(found)
    notes = [f"heads of pretext tasks and classifier dropped: {', '.join(heads)}"] if heads else []
    tensors = dict(found.tensors)
    if not (kind := _inner(tensors)):
        trained = _trained_positions(Path(found.path))
        if trained is None:
            trained = "clf_head" in heads or not heads
        if not trained:
            del tensors["pos_embed"]
            notes.append("pos_embed dropped: pre-training left it out of the pass")
    place = Found(found.path, tensors, found.place, found.beside, found.others)
    converted = CONVERTERS[kind or "timm"](place)
    converted.pixels = {}  # those of the data set that it was trained on
    converted.notes = notes + converted.notes
    return converted


def _relvit_heads(found: Found) -> list[str]:
    parent = found.place.removesuffix("backbone.")
    return [head for head in _RELVIT_HEADS if any(name.startswith(f"{parent}{head}.") for name in found.beside)]


def _trained_positions(path: Path) -> bool | None:
    """Tell whether the second parameter, the position embedding after the class token, ever had a gradient."""
    states = read_file(path).get("optimizer_states")
    if isinstance(states, list) and states and isinstance(state := states[0].get("state"), dict) and state:
        return 1 in state
    return None


def lightly(found: Found) -> Converted:
    """Convert what Lightly's packages trained: a model of timm, DINOv2's or Swin's names inside their wrappers."""
    converted = CONVERTERS[_inner(found.tensors) or "timm"](found)
    converted.pixels = {}
    return converted


CONVERTERS: dict[str, Callable[[Found], Converted]] = {
    "timm": timm,
    "mae": mae,
    "dino": dino,
    "dinov2": dinov2,
    "swin": swin,
    "t2t": t2t,
    "relvit": relvit,
    "lightly": lightly,
}
