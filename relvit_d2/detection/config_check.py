"""Checks of config values that would otherwise fail late or inside Detectron2."""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from math import inf

from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import check_ranges, get_key
from relvit_d2.utils.errors import UserError, nearest

# Minimum and maximum.
_RANGES = {
    "TEST.DETECTIONS_PER_IMAGE": (1, inf),
    "INPUT.MAX_SIZE_TRAIN": (1, inf),
    "INPUT.MIN_SIZE_TEST": (0, inf),  # 0: the image is not resized
    "INPUT.MAX_SIZE_TEST": (1, inf),
    "INPUT.LSJ.SIZE": (0, inf),
    "MODEL.PYRAMID.OUT_CHANNELS": (1, inf),
    "MODEL.PYRAMID.SIZE_DIVISIBILITY": (0, inf),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0, 1),
}

REPEATING = "RepeatFactorTrainingSampler"  # of DATALOADER.SAMPLER_TRAIN

_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "naiveSyncBN", "naiveSyncBN_N", "nnSyncBN")
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
_CHOICES = {
    "MODEL.ROI_BOX_HEAD.NORM": _NORMS,
    "MODEL.ROI_MASK_HEAD.NORM": _NORMS,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign", "ROIPool"),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign", "ROIPool"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", REPEATING),
}

# The registry of detectron2.modeling for each class name.
_REGISTRIES = {
    "MODEL.ANCHOR_GENERATOR.NAME": "anchor_generator.ANCHOR_GENERATOR_REGISTRY",
    "MODEL.BACKBONE.NAME": "backbone.BACKBONE_REGISTRY",
    "MODEL.PROPOSAL_GENERATOR.NAME": "proposal_generator.PROPOSAL_GENERATOR_REGISTRY",
    "MODEL.RPN.HEAD_NAME": "proposal_generator.RPN_HEAD_REGISTRY",
    "MODEL.ROI_HEADS.NAME": "roi_heads.ROI_HEADS_REGISTRY",
    "MODEL.ROI_BOX_HEAD.NAME": "roi_heads.ROI_BOX_HEAD_REGISTRY",
    "MODEL.ROI_MASK_HEAD.NAME": "roi_heads.ROI_MASK_HEAD_REGISTRY",
}
# No norm over the batch: images of different sizes pass the pyramid separately.
_PYRAMID_NORMS = ("", "LN", "GN", "FrozenBN")
_MAIN_HEADS = "StandardROIHeads"  # the default of Detectron2, Res5ROIHeads, reads one level only
_ROTATED = ("RotatedAnchorGenerator", "RRPN", "RROIHeads")


def check_config(cfg: CfgNode, defaults: CfgNode) -> None:
    """Check the values of a config; ``defaults`` has the default ones.

    Raises:
        UserError: a number is out of range, a name is not supported, or the lengths of lists do not match.
    """
    check_ranges(cfg, _RANGES)
    for key, names in _CHOICES.items():
        if (name := get_key(cfg, key)) not in names:
            raise UserError(f"{key} '{name}' is not supported; give {_joined(names)}")
    if (norm := cfg.MODEL.PYRAMID.NORM) not in _PYRAMID_NORMS:
        reason = ": it needs batch statistics, but images of different sizes pass the pyramid separately"
        raise UserError(
            f"MODEL.PYRAMID.NORM '{norm}' is not supported{reason if norm in _NORMS else ''}; give "
            f"{_joined(_PYRAMID_NORMS)}"
        )
    for key, registry in _REGISTRIES.items():
        if (name := get_key(cfg, key)) != (default := get_key(defaults, key)):
            _check_registered(key, name, default, registry)
    loader = cfg.DATALOADER
    if loader.SAMPLER_TRAIN == REPEATING and not 0 < loader.REPEAT_THRESHOLD <= 1:
        raise UserError(
            f"DATALOADER.REPEAT_THRESHOLD {loader.REPEAT_THRESHOLD:g} must be above 0 and at most 1 with {REPEATING}: "
            "give the fraction of images below which a class is rare, such as 0.1"
        )
    _check_sizes(cfg.INPUT)
    _check_anchors(cfg.MODEL)
    _check_matching(cfg.MODEL)


def _joined(names: Sequence[str]) -> str:
    return ", ".join(name or repr("") for name in names)


def _check_registered(key: str, name: str, default: str, registry: str) -> None:
    import detectron2.modeling  # takes seconds; few configs need it

    known = [known for known, _ in reduce(getattr, registry.split("."), detectron2.modeling)]
    if name not in known:
        raise UserError(f"{key} '{name}' is not registered in Detectron2{nearest(name, known)}")
    default = _MAIN_HEADS if key == "MODEL.ROI_HEADS.NAME" else default
    if name in _ROTATED:
        raise UserError(f"{key} '{name}' is for rotated boxes, which are not supported: set {default}")
    if name == "CascadeROIHeads":
        raise UserError(f"{key} '{name}' has several box heads, which are not supported: set {default}")


def _check_sizes(keys: CfgNode) -> None:
    sides = keys.MIN_SIZE_TRAIN
    if not sides or min(sides) < 1:
        raise UserError(f"INPUT.MIN_SIZE_TRAIN {sides} must be one or more sides of 1 pixel or more")
    if keys.MIN_SIZE_TRAIN_SAMPLING == "range" and not (len(sides) == 2 and sides[0] <= sides[1]):
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN {sides} is not a range: give minimum and maximum, or set "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING choice"
        )
    relative = keys.CROP.TYPE.startswith("relative")
    if len(keys.CROP.SIZE) != 2 or min(keys.CROP.SIZE) <= 0 or (relative and max(keys.CROP.SIZE) > 1):
        unit = "fractions of the image's height and width, in (0, 1]" if relative else "height and width in pixels"
        raise UserError(f"INPUT.CROP.SIZE {keys.CROP.SIZE} does not match CROP.TYPE {keys.CROP.TYPE}: give {unit}")
    if not (len(keys.LSJ.SCALE) == 2 and 0 < keys.LSJ.SCALE[0] <= keys.LSJ.SCALE[1]):
        raise UserError(
            f"INPUT.LSJ.SCALE {keys.LSJ.SCALE} is not a range of scale factors: give minimum and maximum, above 0"
        )


def _check_anchors(model: CfgNode) -> None:
    """Check anchors and levels from which Detectron2 cannot build an RPN or a pooler."""
    for key in ("RPN", "ROI_HEADS"):
        if not model[key].IN_FEATURES:
            raise UserError(
                f"MODEL.{key}.IN_FEATURES is empty: name one or more levels of MODEL.PYRAMID, such as ['p3']"
            )
    pooled = model.ROI_HEADS.IN_FEATURES
    numbers = [int(name[1:]) for name in pooled if name[:1] == "p" and name[1:].isdecimal()]
    if len(numbers) == len(pooled) and any(b - a != 1 for a, b in pairwise(numbers)):
        raise UserError(f"MODEL.ROI_HEADS.IN_FEATURES {pooled} must be consecutive levels, finest first")
    levels = model.RPN.IN_FEATURES
    counts = {}
    for key in ("SIZES", "ASPECT_RATIOS"):
        lists = model.ANCHOR_GENERATOR[key]
        full = f"MODEL.ANCHOR_GENERATOR.{key}"
        if lists and not isinstance(lists[0], Sequence):  # Detectron2 uses one list for all levels
            lists = [lists]
        if len(lists) not in (1, len(levels)):
            raise UserError(
                f"{full} has {len(lists)} lists, but MODEL.RPN.IN_FEATURES has {len(levels)} levels {list(levels)}: "
                "give one list for each level, or one for all"
            )
        for values in lists:
            if not (isinstance(values, Sequence) and values and min(values) > 0):
                raise UserError(f"{full} {lists} must be lists of one or more positive numbers")
        counts[key] = [len(values) for values in lists] * (len(levels) if len(lists) == 1 else 1)
    anchors = [sizes * ratios for sizes, ratios in zip(counts["SIZES"], counts["ASPECT_RATIOS"], strict=True)]
    if len(set(anchors)) > 1:
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS give {anchors} anchors per cell on the levels "
            f"{list(levels)}: give the same number on each level"
        )


def _check_matching(model: CfgNode) -> None:
    """Check the number of IoU thresholds, IoU labels and box regression weights."""
    for key in ("RPN", "ROI_HEADS"):
        bounds, labels = model[key].IOU_THRESHOLDS, model[key].IOU_LABELS
        if not bounds or sorted(bounds) != list(bounds) or len(labels) != len(bounds) + 1:
            raise UserError(
                f"MODEL.{key}.IOU_THRESHOLDS {bounds} and IOU_LABELS {labels} do not match: give ascending "
                "thresholds, and one label more than thresholds"
            )
    for key in ("RPN", "ROI_BOX_HEAD"):
        if len(weights := model[key].BBOX_REG_WEIGHTS) != 4 or min(weights) <= 0:
            raise UserError(f"MODEL.{key}.BBOX_REG_WEIGHTS {weights} must be four numbers above 0")
