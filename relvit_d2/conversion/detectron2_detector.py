"""Checkpoints of Detectron2's ViTDet under the names of this package's detectors.

Names of tensors are those of Detectron2 0.6 (``modeling/backbone/vit.py``, ``modeling/roi_heads``). Values that names
and shapes do not show are those of ``model_zoo/configs/common/models/mask_rcnn_vitdet.py`` and ``mask_rcnn_fpn.py``.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from relvit_d2.encoders.vit import VITDET_SIZES
from relvit_d2.encoders.windowed import resized_table
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import printable

Tensors = dict[str, Tensor]

_VIT = "backbone.net."  # prefix of the encoder in a simple pyramid
_BOX, _MASK = "roi_heads.box_predictor", "roi_heads.mask_head.predictor"
# Rows per class of the class-specific layers, and rows in addition (of the background).
_CLASS_LAYERS = {f"{_BOX}.cls_score": (1, 1), f"{_BOX}.bbox_pred": (4, 0), _MASK: (1, 0)}


@dataclass
class Detectron2Checkpoint:
    """The tensors of a ViTDet of Detectron2.

    Attributes:
        path: the file.
        tensors: tensors under Detectron2's names, of a cascade those of the first stage as of the only one.
        left_out: names of the tensors of further stages.
    """

    path: str
    tensors: Tensors
    left_out: list[str] = field(default_factory=list)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.tensors[f"{_BOX}.cls_score.weight"]) - 1


def find_detector(path: str, model: Mapping[str, Any]) -> Detectron2Checkpoint | None:
    """Return the checkpoint of a ViTDet; None if the names of its tensors are not those of Detectron2's ViTDet.

    Args:
        path: the file.
        model: tensors or arrays by name.

    Raises:
        UserError: an entry is neither a tensor nor an array of numbers.
    """
    if f"{_VIT}patch_embed.proj.weight" not in model:
        return None
    found = Detectron2Checkpoint(path, {})
    for name, value in model.items():
        # Later stages of a cascade, and anchors, which are not weights.
        if re.match(r"roi_heads\.box_(head|predictor)\.[1-9]\.|.*\.cell_anchors\.", name):
            found.left_out.append(name)
            continue
        first = re.sub(r"^(roi_heads\.box_(?:head|predictor))\.0\.", r"\1.", name)
        found.tensors[first] = _tensor(path, name, value)
    return found


def _tensor(path: str, name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise UserError(f"'{path}': '{printable(name)}' is not a tensor of numbers; give a checkpoint of Detectron2")
    return value.float()


def config_keys(found: Detectron2Checkpoint) -> dict[str, Any]:
    """Return the config keys, by full name, with which a detector of this package has the parts of the checkpoint.

    Raises:
        UserError: parts are missing or not supported.
    """
    try:
        keys = _encoder_keys(found) | _pyramid_keys(found.tensors) | _head_keys(found)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"'{found.path}' contains an incomplete ViTDet ({error}): give a checkpoint of the whole detector"
        ) from error
    side = keys["MODEL.ENCODER.IMG_SIZE"]
    return keys | {
        "MODEL.PYRAMID.SIZE_DIVISIBILITY": side,  # square_pad, for images of at most that side
        "INPUT.MIN_SIZE_TRAIN": [side],
        "INPUT.MAX_SIZE_TRAIN": side,
        "INPUT.MIN_SIZE_TEST": side,
        "INPUT.MAX_SIZE_TEST": side,
    }


def _encoder_keys(found: Detectron2Checkpoint) -> dict[str, Any]:
    tensors = found.tensors
    weight = tensors[f"{_VIT}patch_embed.proj.weight"]
    width, patch = int(weight.shape[0]), int(weight.shape[-1])
    depth = 1 + max(int(m[1]) for name in tensors if (m := re.match(rf"{re.escape(_VIT)}blocks\.(\d+)\.", name)))
    tables = [tensors.get(f"{_VIT}blocks.{index}.attn.rel_pos_h") for index in range(depth)]
    lengths = [len(table) for table in tables if table is not None]
    if len(lengths) < depth or len({*lengths}) != 2 or any(".residual." in name for name in tensors):
        raise UserError(
            f"'{found.path}' contains a ViT with {depth} blocks and relative positions of {len(lengths)} of them for "
            f"{len({*lengths})} window sizes; supported are blocks with relative positions and without residual "
            "convolutions, some of them with windows: give another checkpoint"
        )
    across = [index for index, length in enumerate(lengths) if length == max(lengths)]
    if across != [depth * (i + 1) // len(across) - 1 for i in range(len(across))]:
        raise UserError(
            f"'{found.path}' has global attention in the blocks {across} of {depth}, which are not evenly spaced: this "
            "is not supported; give another checkpoint"
        )
    size = (width, depth, width // tensors[f"{_VIT}blocks.0.attn.rel_pos_h"].shape[1])
    names = [name for name, known in VITDET_SIZES.items() if known == size]
    if not names:
        raise UserError(
            f"'{found.path}' contains a ViT of width {width} with {depth} blocks of {size[2]} heads; supported are the "
            f"sizes {', '.join(VITDET_SIZES)}: give another checkpoint"
        )
    return {
        "MODEL.ENCODER.NAME": f"vitdet:{names[0]}",
        "MODEL.ENCODER.PATCH_SIZE": patch,
        "MODEL.ENCODER.IMG_SIZE": (max(lengths) + 1) // 2 * patch,
        "MODEL.ENCODER.POS_EMBED": f"{_VIT}pos_embed" in tensors,
        "MODEL.ENCODER.WINDOW": (min(lengths) + 1) // 2,
        "MODEL.ENCODER.GLOBAL_BLOCKS": len(across),
        "MODEL.ENCODER.REL_POS": True,
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
    }


def _pyramid_keys(tensors: Tensors) -> dict[str, Any]:
    levels = sorted({int(m[1]) for name in tensors if (m := re.match(r"backbone\.simfp_(\d+)\.", name))})
    outputs = [value for name, value in tensors.items() if re.match(r"backbone\.simfp_\d+\.\d+\.weight", name)]
    return {
        "MODEL.PYRAMID.NAME": "simple",
        "MODEL.PYRAMID.STRIDES": [2**level for level in levels],
        "MODEL.PYRAMID.TOP_BLOCK": True,
        "MODEL.PYRAMID.OUT_CHANNELS": int(outputs[-1].shape[0]),
        "MODEL.PYRAMID.NORM": _norm(tensors, r"backbone\.simfp_"),
    }


def _norm(tensors: Tensors, part: str) -> str:
    return "LN" if any(re.match(rf"{part}.*\.norm\.weight$", name) for name in tensors) else ""


def _head_keys(found: Detectron2Checkpoint) -> dict[str, Any]:
    tensors = found.tensors

    def count(part: str) -> int:
        return sum(bool(re.fullmatch(rf"{part}\d+\.weight", name)) for name in tensors)

    box, mask = r"roi_heads\.box_head\.", r"roi_heads\.mask_head\."
    convolutions, masks = count(f"{box}conv"), f"{_MASK}.weight" in tensors
    keys = {
        "MODEL.MASK_ON": masks,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.RPN.CONV_DIMS": [-1] * (count(r"proposal_generator\.rpn_head\.conv\.conv") or 1),
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": convolutions,
        "MODEL.ROI_BOX_HEAD.NUM_FC": count(f"{box}fc"),
        "MODEL.ROI_BOX_HEAD.FC_DIM": int(tensors["roi_heads.box_head.fc1.weight"].shape[0]),
        "MODEL.ROI_BOX_HEAD.NORM": _norm(tensors, box),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": len(tensors[f"{_BOX}.bbox_pred.weight"]) < 4 * found.classes,
    }
    if convolutions:
        keys["MODEL.ROI_BOX_HEAD.CONV_DIM"] = int(tensors["roi_heads.box_head.conv1.weight"].shape[0])
    if masks:
        keys |= {
            "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
            "MODEL.ROI_MASK_HEAD.NUM_CONV": count(f"{mask}mask_fcn"),
            "MODEL.ROI_MASK_HEAD.CONV_DIM": int(tensors["roi_heads.mask_head.mask_fcn1.weight"].shape[0]),
            "MODEL.ROI_MASK_HEAD.NORM": _norm(tensors, mask),
            "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": len(tensors[f"{_MASK}.weight"]) < found.classes,
        }
    return keys


# Keys that have no effect on which tensors fit, or that users change for their data.
_FREE = re.compile(
    r"INPUT\.(?!FORMAT)|MODEL\.(MASK_ON|RPN\.P|ANCHOR_GENERATOR|ENCODER\.IMG_SIZE|PYRAMID\.SIZE_DIVISIBILITY)|.*\.POOLER"
)


def check_keys(found: Detectron2Checkpoint, key: Callable[[str], Any]) -> None:
    """Raise a :class:`UserError` that names the keys of a config with which the checkpoint does not fit.

    Args:
        found: the checkpoint.
        key: returns the value of a key in the config.
    """
    masks = key("MODEL.MASK_ON")
    different = {
        name: value
        for name, value in config_keys(found).items()
        if not (_FREE.match(name) or ("ROI_MASK_HEAD" in name and not masks)) and _plain(key(name)) != value
    }
    if different:
        first = ", ".join(f"{name} {value}" for name, value in list(different.items())[:4])
        raise UserError(
            f"'{found.path}' is a ViTDet of Detectron2, which needs {len(different)} other config keys ({first}"
            f"{', ...' if len(different) > 4 else ''}): set them, or let relvit-d2 convert --from detectron2 write a "
            "config"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def renamed(found: Detectron2Checkpoint, current: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    """Return the tensors under the names of a detector of this package, and the names of those that were resized.

    Positions are resized as Detectron2's ViT resizes them in its forward pass, to the grid of ``current``, the state of
    the detector: the features are equal for images of that size.
    """
    tensors, resized = {}, []
    for name, value in found.tensors.items():
        new = name.replace(_VIT, f"{_VIT}encoder.vit.", 1) if name.startswith(_VIT) else name
        shape = current[new].shape if new in current else value.shape
        if name == f"{_VIT}pos_embed":
            value = _positions(value, math.isqrt(shape[1]))
        elif re.search(r"\.rel_pos_[hw]$", name) and value.shape[1:] == shape[1:] and len(value) != shape[0]:
            value = resized_table(value, shape[0])
        if value.shape != found.tensors[name].shape:
            resized.append(new)
        tensors[new] = value
    return tensors, resized


def _positions(value: Tensor, side: int) -> Tensor:
    """Resize a position embedding ``(1, 1 + n * n, C)``, or without the class token, to ``(1, side * side, C)``."""
    old = math.isqrt(value.shape[1])
    grid = value[:, value.shape[1] - old * old :]
    if old == side:
        return grid
    # Without antialiasing, as in detectron2/modeling/backbone/utils.py:150-158.
    maps = F.interpolate(grid.mT.unflatten(2, (old, old)), size=(side, side), mode="bicubic", align_corners=False)
    return maps.flatten(2).mT


def fit_classes(
    tensors: Tensors, current: Mapping[str, Tensor], saved: Sequence[str] | None, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Replace the layers of other classes by new ones, in place; rows of classes of the same name are kept.

    Args:
        tensors: the tensors of a checkpoint, changed in place.
        current: the state of the detector, with new layers.
        saved: class names of the checkpoint; None: not known, so that layers of the same shape are kept.
        names: class names of the detector.

    Returns:
        The names of the replaced tensors, and of the classes whose rows were kept in them.
    """
    saved = None if saved is None else list(saved)
    if saved == list(names):
        return [], []
    replaced = []
    for layer, (rows, more) in _CLASS_LAYERS.items():
        for full in (f"{layer}.weight", f"{layer}.bias"):
            if full not in tensors or full not in current:
                continue
            old, new = tensors[full], current[full].clone().cpu()
            agnostic = saved is not None and len(old) != rows * len(saved) + more
            if old.shape == new.shape and (saved is None or agnostic):
                continue
            replaced.append(full)
            tensors[full] = new
            if saved is None or agnostic or len(new) != rows * len(names) + more or old.shape[1:] != new.shape[1:]:
                continue
            for index, name in enumerate(names):
                if name in saved:
                    place = rows * saved.index(name)
                    new[rows * index : rows * (index + 1)] = old[place : place + rows]
            if more:  # the background
                new[-more:] = old[-more:]
    kept = [name for name in names if name in saved] if saved and replaced else []
    return replaced, kept


def adapt_checkpoint(
    path: str,
    checkpoint: dict[str, Any],
    current: Mapping[str, Tensor],
    key: Callable[[str], Any],
    names: Sequence[str] | None,
) -> str:
    """Convert the entry ``model`` of a checkpoint for a detector, if it is Detectron2's or has class names, in place.

    Args:
        path: the file.
        checkpoint: its content; the entry ``class_names``, a list of names, is optional.
        current: the state of the detector.
        key: returns the value of a key in the detector's config.
        names: class names of the detector; None: the classes must be those of the checkpoint.

    Returns:
        A report of the loaded and the other tensors; empty if the checkpoint was not changed.

    Raises:
        UserError: the checkpoint does not fit the config.
    """
    saved = checkpoint.get("class_names")
    # With Detectron2's own backbone the names are equal.
    found = None if f"{_VIT}patch_embed.proj.weight" in current else find_detector(path, checkpoint["model"])
    tensors, resized, left_out = checkpoint["model"], list[str](), list[str]()
    if found is not None:
        check_keys(found, key)
        tensors, resized = renamed(found, current)
        left_out = found.left_out
        checkpoint.pop("matching_heuristics", None)
    elif saved is None or names is None:
        return ""
    replaced, kept = fit_classes(tensors, current, saved, names) if names is not None else ([], [])
    checkpoint["model"] = tensors
    lines = [f"weights '{path}':", _report(tensors, current, resized, left_out, replaced)]
    if kept:
        lines.append(f"  classes of the same name keep their values: {printable(', '.join(kept))}")
    return "\n".join(lines)


def _report(
    tensors: Tensors, current: Mapping[str, Tensor], resized: list[str], left_out: list[str], replaced: list[str]
) -> str:
    """Return as text how the tensors of a checkpoint are used by a detector with the state ``current``."""
    fits = {name for name, value in tensors.items() if name in current and current[name].shape == value.shape}
    groups = {
        "loaded": sorted(fits - {*replaced}),
        "resized": resized,
        "new": sorted({*current} - fits | {*replaced}),
        "left out": sorted([*left_out, *({*tensors} - fits)]),
    }
    lines = []
    for what, names in groups.items():
        parts = sorted({re.sub(r"\.(weight|bias)$", "", name) for name in names})
        shown = "" if what == "loaded" or not parts else ": " + printable(", ".join(parts[:6]))
        lines.append(f"  {what:<10} {len(names):>4}{shown}{', ...' if shown and len(parts) > 6 else ''}")
    return "\n".join(lines)
