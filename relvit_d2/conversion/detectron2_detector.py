"""Conversion of Detectron2's checkpoints to those of this package's detectors, and class-specific layers."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from relvit_d2.conversion.detectron2_checkpoint import (
    BOX,
    EMBEDDING,
    MASK,
    SWIN,
    VIT,
    Detectron2Checkpoint,
    Tensors,
    config_keys,
    find_detector,
)
from relvit_d2.encoders.swin import PATCH, SWIN_SIZES
from relvit_d2.encoders.windowed import resized_table
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import printable

# Rows per class of the class-specific layers, and rows in addition (of the background).
_CLASS_LAYERS = {f"{BOX}.cls_score": (1, 1), f"{BOX}.bbox_pred": (4, 0), MASK: (1, 0)}

# Keys that do not determine the tensors, or that users change for their data.
_FREE = re.compile(
    r"INPUT\.(?!FORMAT)|TEST\.|MODEL\.(MASK_ON|RPN\.P|ANCHOR_GENERATOR|ENCODER\.IMG_SIZE)"
    r"|MODEL\.PYRAMID\.(SIZE_DIVISIBILITY|TOP_BLOCK)|.*\.(POOLER|USE_SIGMOID_CE|SCORE_THRESH)"
)


def check_keys(found: Detectron2Checkpoint, key: Callable[[str], Any], whole: bool = True) -> None:
    """Raise a :class:`UserError` that names the keys of a config with which the checkpoint does not fit.

    Args:
        found: the checkpoint.
        key: returns the value of a key in the config.
        whole: as for :func:`relvit_d2.conversion.detectron2_checkpoint.config_keys`.
    """
    masks = whole and key("MODEL.MASK_ON")
    different = {
        name: value
        for name, value in config_keys(found, whole).items()
        if not (_FREE.match(name) or ("ROI_MASK_HEAD" in name and not masks))
        and _plain(key(name)) != value
        and (name, key(name)) != ("MODEL.PYRAMID.NAME", "auto")
    }
    if different:
        first = ", ".join(f"{name} {value}" for name, value in list(different.items())[:4])
        raise UserError(
            f"'{found.path}' holds Detectron2's {found.kind}, which needs {len(different)} other config keys ({first}"
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
        new = _renamed(name)
        shape = current[new].shape if new in current else value.shape
        if name == f"{VIT}pos_embed":
            value = _positions(value, math.isqrt(shape[1]))
        elif re.search(r"\.rel_pos_[hw]$", name) and value.shape[1:] == shape[1:] and len(value) != shape[0]:
            value = resized_table(value, shape[0])
        if value.shape != found.tensors[name].shape:
            resized.append(new)
        tensors[new] = value
    return tensors, resized


def _renamed(name: str) -> str:
    if name.startswith(VIT):
        return name.replace(VIT, f"{VIT}encoder.vit.", 1)
    if not name.startswith(SWIN):
        return name
    inner = name.removeprefix(SWIN)
    if norm := re.fullmatch(r"norm(\d)\.(\w+)", inner):
        stage = int(norm[1])
        last = stage == len(SWIN_SIZES["tiny"][1]) - 1
        return f"{SWIN}encoder.swin.norm.{norm[2]}" if last else f"{SWIN}norms.s{PATCH << stage}.{norm[2]}"
    # timm downsamples at the start of a stage, Detectron2 at the end of the one before.
    moved = re.sub(r"^layers\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", inner)
    return f"{SWIN}encoder.swin.{moved}"


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
        A report of the loaded and the other tensors; empty for a checkpoint of this package without
        class names.

    Raises:
        UserError: the checkpoint does not fit the config.
    """
    saved = checkpoint.get("class_names")
    # With Detectron2's own backbone the names are equal.
    theirs = {f"{VIT}{EMBEDDING}", f"{SWIN}{EMBEDDING}"} & current.keys()
    found = None if theirs else find_detector(path, checkpoint["model"])
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


def adapt_encoder(
    path: str, checkpoint: dict[str, Any], current: Mapping[str, Tensor], key: Callable[[str], Any]
) -> str:
    """Convert the entry ``model`` of a checkpoint of Detectron2's detectors for its encoder alone, in place.

    Args:
        path, checkpoint, key: as for :func:`adapt_checkpoint`.
        current: the state of the encoder.

    Returns:
        A report of the loaded and the other tensors.

    Raises:
        UserError: the checkpoint is not one of Detectron2's detectors, or does not fit the config.
    """
    found = find_detector(path, checkpoint["model"])
    if found is None:
        raise UserError(
            f"'{path}' is neither an encoder.safetensors nor a ViTDet or R-CNN on Swin of Detectron2: convert weights "
            "of other projects with relvit-d2 convert, or set MODEL.WEIGHTS to an encoder.safetensors or timm:NAME"
        )
    check_keys(found, key, whole=False)
    checkpoint.pop("matching_heuristics", None)
    prefix = f"{VIT if found.kind == 'ViTDet' else SWIN}encoder."
    tensors, resized = renamed(found, {f"{prefix}{name}": value for name, value in current.items()})
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    checkpoint["model"] = inside
    resized = [name.removeprefix(prefix) for name in resized]
    others = [name for name in tensors if not name.startswith(prefix)]
    return f"encoder of '{path}':\n{_report(inside, current, resized, [*found.left_out, *others], [])}"


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
