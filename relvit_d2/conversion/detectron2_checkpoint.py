"""Checkpoints of Detectron2's ViTDet and of its R-CNN on Swin, and the config keys of the same detectors.

Names of tensors are those of Detectron2 0.6 (``modeling/backbone/vit.py``, ``swin.py`` and ``fpn.py``,
``modeling/roi_heads``). Values that names and shapes do not show are those of
``model_zoo/configs/common/models/mask_rcnn_vitdet.py`` and ``mask_rcnn_fpn.py``, and for Swin those of
``projects/ViTDet/configs/COCO/cascade_mask_rcnn_swin_b_in21k_50ep.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relvit_d2.encoders.plain import evenly_spaced
from relvit_d2.encoders.swin import SWIN_SIZES, WINDOW
from relvit_d2.encoders.vit import VITDET_SIZES
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import printable

Tensors = dict[str, Tensor]

VIT = "backbone.net."  # prefix of the encoder in a simple pyramid
SWIN = "backbone.bottom_up."  # prefix of the encoder in an FPN
EMBEDDING = "patch_embed.proj.weight"
BOX, MASK = "roi_heads.box_predictor", "roi_heads.mask_head.predictor"
_SWIN_SIDE = 1024  # side in pixels of the padded images
_LVIS = 1203  # classes
# Tensors of later stages of a cascade, and buffers that are computed or set by the config.
_LEFT_OUT = re.compile(
    r"roi_heads\.box_(head|predictor)\.[1-9]\.|.*\.(cell_anchors\.|relative_position_index$)|pixel_(mean|std)$"
)


@dataclass
class Detectron2Checkpoint:
    """The tensors of a ViTDet, or of an R-CNN on Swin, of Detectron2.

    Attributes:
        path: the file.
        tensors: tensors under Detectron2's names, of a cascade those of the first stage as of the only one.
        left_out: names of the tensors of further stages, and of tensors that are no weights.
    """

    path: str
    tensors: Tensors
    left_out: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Name of the architecture."""
        return "ViTDet" if f"{VIT}{EMBEDDING}" in self.tensors else "R-CNN on Swin"

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.tensors[f"{BOX}.cls_score.weight"]) - 1


def find_detector(path: str, model: Mapping[str, Any]) -> Detectron2Checkpoint | None:
    """Return the checkpoint of a ViTDet or of an R-CNN on Swin; None if the names of its tensors are of neither.

    Args:
        path: the file.
        model: tensors or arrays by name.

    Raises:
        UserError: an entry is neither a tensor nor an array of numbers.
    """
    if not {f"{VIT}{EMBEDDING}", f"{SWIN}{EMBEDDING}"} & model.keys():
        return None
    found = Detectron2Checkpoint(path, {})
    for name, value in model.items():
        if _LEFT_OUT.match(name):
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


def config_keys(found: Detectron2Checkpoint, whole: bool = True) -> dict[str, Any]:
    """Return the config keys, by full name, with which a model of this package has the parts of the checkpoint.

    Args:
        found: the checkpoint.
        whole: whether the model is the detector; False: its encoder alone, with the pixel statistics.

    Raises:
        UserError: parts are missing or not supported.
    """
    try:
        is_vit = found.kind == "ViTDet"
        keys = _vit_keys(found) if is_vit else _swin_keys(found)
        keys |= {"MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375]}
        if not whole:
            return keys
        side = keys["MODEL.ENCODER.IMG_SIZE"] if is_vit else _SWIN_SIDE
        keys |= (_simple_keys if is_vit else _fpn_keys)(found.tensors) | _head_keys(found)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"'{found.path}' contains an incomplete {found.kind} ({error}): give a checkpoint of the whole detector"
        ) from error
    return keys | {
        "MODEL.PYRAMID.TOP_BLOCK": True,
        "INPUT.FORMAT": "RGB",
        "MODEL.PYRAMID.SIZE_DIVISIBILITY": side,  # square_pad, for images of at most that side
        "INPUT.MIN_SIZE_TRAIN": [side],
        "INPUT.MAX_SIZE_TRAIN": side,
        "INPUT.MIN_SIZE_TEST": side,
        "INPUT.MAX_SIZE_TEST": side,
    }


def _vit_keys(found: Detectron2Checkpoint) -> dict[str, Any]:
    tensors = found.tensors
    weight = tensors[f"{VIT}{EMBEDDING}"]
    width, patch = int(weight.shape[0]), int(weight.shape[-1])
    depth = 1 + max(int(m[1]) for name in tensors if (m := re.match(rf"{re.escape(VIT)}blocks\.(\d+)\.", name)))
    tables = [tensors.get(f"{VIT}blocks.{index}.attn.rel_pos_h") for index in range(depth)]
    lengths = [len(table) for table in tables if table is not None]
    if len(lengths) < depth or len({*lengths}) != 2 or any(".residual." in name for name in tensors):
        raise UserError(
            f"'{found.path}' contains a ViT with {depth} blocks and relative positions of {len(lengths)} of them for "
            f"{len({*lengths})} window sizes; supported are blocks with relative positions and without residual "
            "convolutions, some of them with windows: give another checkpoint"
        )
    across = [index for index, length in enumerate(lengths) if length == max(lengths)]
    if across != evenly_spaced(len(across), depth):
        raise UserError(
            f"'{found.path}' has global attention in the blocks {across} of {depth}, which are not evenly spaced: this "
            "is not supported; give another checkpoint"
        )
    size = (width, depth, width // tensors[f"{VIT}blocks.0.attn.rel_pos_h"].shape[1])
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
        "MODEL.ENCODER.POS_EMBED": f"{VIT}pos_embed" in tensors,
        "MODEL.ENCODER.WINDOW": (min(lengths) + 1) // 2,
        "MODEL.ENCODER.GLOBAL_BLOCKS": len(across),
        "MODEL.ENCODER.REL_POS": True,
    }


def _swin_keys(found: Detectron2Checkpoint) -> dict[str, Any]:
    tensors = found.tensors
    weight, table = tensors[f"{SWIN}{EMBEDDING}"], "attn.relative_position_bias_table"
    depths, heads = [], []
    for stage in range(4):
        first = tensors[f"{SWIN}layers.{stage}.blocks.0.{table}"]
        depths.append(sum(bool(re.match(rf"{SWIN}layers\.{stage}\.blocks\.\d+\.{table}", n)) for n in tensors))
        heads.append(int(first.shape[1]))
    size = (int(weight.shape[0]), tuple(depths), tuple(heads))
    names = [name for name, known in SWIN_SIZES.items() if known == size]
    windows = {int(len(value) ** 0.5 + 1) // 2 for name, value in tensors.items() if name.endswith(table)}
    if not names or windows != {WINDOW} or f"{SWIN}absolute_pos_embed" in tensors:
        raise UserError(
            f"'{found.path}' contains a Swin of width {size[0]} with {size[1]} blocks and windows of {windows}; "
            f"supported are the sizes {', '.join(SWIN_SIZES)} with windows of {WINDOW} and without position embedding: "
            "give another checkpoint"
        )
    return {
        "MODEL.ENCODER.NAME": "swin_tiny" if names[0] == "tiny" else f"swin:{names[0]}",
        "MODEL.ENCODER.PATCH_SIZE": int(weight.shape[-1]),
    }


def _fpn_keys(tensors: Tensors) -> dict[str, Any]:
    part = r"backbone\.fpn_lateral"
    levels = sorted({int(m[1]) for name in tensors if (m := re.match(rf"{part}(\d+)\.", name))})
    return {
        "MODEL.PYRAMID.NAME": "fpn",
        "MODEL.PYRAMID.STRIDES": [2**level for level in levels],
        "MODEL.PYRAMID.OUT_CHANNELS": int(tensors[f"backbone.fpn_lateral{levels[0]}.weight"].shape[0]),
        "MODEL.PYRAMID.NORM": _norm(tensors, part),
    }


def _simple_keys(tensors: Tensors) -> dict[str, Any]:
    levels = sorted({int(m[1]) for name in tensors if (m := re.match(r"backbone\.simfp_(\d+)\.", name))})
    outputs = [value for name, value in tensors.items() if re.match(r"backbone\.simfp_\d+\.\d+\.weight", name)]
    return {
        "MODEL.PYRAMID.NAME": "simple",
        "MODEL.PYRAMID.STRIDES": [2**level for level in levels],
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
    convolutions, masks = count(f"{box}conv"), f"{MASK}.weight" in tensors
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
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": len(tensors[f"{BOX}.bbox_pred.weight"]) < 4 * found.classes,
    }
    if found.classes == _LVIS:  # projects/ViTDet/configs/LVIS/mask_rcnn_vitdet_b_100ep.py
        keys |= {
            "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.02,
            "TEST.DETECTIONS_PER_IMAGE": 300,
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
            "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": len(tensors[f"{MASK}.weight"]) < found.classes,
        }
    return keys
