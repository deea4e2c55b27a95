"""How well anchors fit the boxes of a data set at training size, and which anchors would fit better."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from relvit_d2.data.detection.mapper import ShortestEdge
from relvit_d2.utils.printing import shell_command

SAMPLE = 20_000  # maximum number of boxes, evenly spaced: the standard error of a fraction of them is below 0.4 %
_BASES = 2.0 ** np.arange(0, 5.01, 0.25)  # tried ratios of anchor size to stride, 1 to 32; Detectron2's default is 8


@dataclass(frozen=True)
class Anchors:
    """Anchors of a detector.

    Attributes:
        strides: stride of each level, pixels.
        sizes: square roots of the anchor areas of each level, pixels.
        ratios: height over width of the anchors of each level.
        offset: distance of the first anchor's centre from the corner of the image, in strides.
    """

    strides: tuple[int, ...]
    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[tuple[float, ...], ...]
    offset: float

    @classmethod
    def of(cls, cfg: CfgNode) -> "Anchors | None":
        """Return the anchors of a config, None if its levels are not named ``p2``, ``p3``, ... (strides 4, 8, ...)."""
        levels = [re.fullmatch(r"p(\d+)", name) for name in cfg.MODEL.RPN.IN_FEATURES]
        strides = tuple(2 ** int(level[1]) for level in levels if level)
        node = cfg.MODEL.ANCHOR_GENERATOR
        sizes, ratios = (_per_level(values, len(strides)) for values in (node.SIZES, node.ASPECT_RATIOS))
        if len(strides) != len(levels) or not len(strides) == len(sizes) == len(ratios):
            return None
        return cls(strides, sizes, ratios, node.OFFSET)

    def best_ious(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return the largest IoU of each box with an anchor on Detectron2's grid, ``(N,)`` in 0..1.

        Args:
            boxes: (N, 4) XYXY in pixels.
            sizes: (N, 2) width and height of each box's image.
        """
        best = np.zeros(len(boxes))
        centres, extents = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        for stride, level_sizes, ratios in zip(self.strides, self.sizes, self.ratios, strict=True):
            # Among anchors of one shape the nearest has the largest overlap.
            cells = np.clip(np.rint(centres / stride - self.offset), 0, np.ceil(sizes / stride) - 1)
            shifts = np.abs((cells + self.offset) * stride - centres)
            for size in level_sizes:
                for ratio in ratios:
                    anchor = np.array([size / math.sqrt(ratio), size * math.sqrt(ratio)])
                    overlap = np.minimum(np.minimum(extents, anchor), (extents + anchor) / 2 - shifts)
                    intersection = overlap.clip(0).prod(1)
                    best = np.maximum(best, intersection / (extents.prod(1) + size * size - intersection))
        return best


def training_boxes(boxes: np.ndarray, sizes: np.ndarray, cfg: CfgNode) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes and image sizes at training size, without cropping.

    Of several training sizes (``INPUT.MIN_SIZE_TRAIN``, ``INPUT.LSJ.SCALE``) the middle one is used.

    Args:
        boxes: (N, 4) XYXY in pixels.
        sizes: (N, 2) width and height of each box's image.
    """
    shapes, inverse = np.unique(sizes, axis=0, return_inverse=True)
    resized = np.array([_resized(int(width), int(height), cfg) for width, height in shapes], dtype=np.float64)
    new = resized.reshape(-1, 2)[inverse.reshape(-1)]
    return boxes * np.tile(new / sizes, 2), new


def proposal(boxes: np.ndarray, sizes: np.ndarray, anchors: Anchors) -> Anchors:
    """Return the anchors with the largest mean best IoU among some candidates, as many per level as ``anchors`` has.

    The aspect ratios are cluster means of those of the boxes. Candidate sizes are cluster means of those of the boxes,
    and sizes that double from level to level.
    """
    extents = boxes[:, 2:] - boxes[:, :2]
    count = len(anchors.ratios[0])
    ratios = tuple(_rounded(value) for value in _clusters(extents[:, 1] / extents[:, 0], count).tolist())
    per_level, levels = len(anchors.sizes[0]), len(anchors.strides)
    inner = 2.0 ** (np.arange(per_level) / per_level)
    doubling = [np.outer(np.array(anchors.strides) * base, inner) for base in _BASES]
    clustered = _clusters(np.sqrt(extents.prod(1)), levels * per_level).reshape(levels, per_level)
    best, fit = anchors, float(anchors.best_ious(boxes, sizes).mean())
    for table in (*doubling, clustered):
        rounded = tuple(tuple(float(max(round(size), 1)) for size in level) for level in table.tolist())
        tried = Anchors(anchors.strides, rounded, (ratios,) * levels, anchors.offset)
        if (mean := float(tried.best_ious(boxes, sizes).mean())) > fit:
            best, fit = tried, mean
    return best


def fit_report(boxes: np.ndarray, sizes: np.ndarray, cfg: CfgNode) -> dict[str, Any]:
    """Compare the boxes of a data set with a config's anchors; return JSON values.

    Args:
        boxes: (N, 4) XYXY in pixels, with positive areas.
        sizes: (N, 2) width and height of each box's image.

    Returns:
        Empty without boxes or if :meth:`Anchors.of` finds no anchors. Else ``side``: percentiles of the square root of
        the box area at training size, pixels; ``ratio``: percentiles of height over width; ``anchors`` and
        ``proposal``: ``SIZES``, ``ASPECT_RATIOS``, the mean ``best_iou`` and the fractions of boxes whose best IoU is
        at least 0.5 (``reach_50``) and at least the threshold for positive anchors (``reach_positive``).
    """
    anchors = Anchors.of(cfg)
    if anchors is None or not len(boxes):
        return {}
    step = math.ceil(len(boxes) / SAMPLE)
    boxes, sizes = training_boxes(boxes[::step], sizes[::step], cfg)
    extents = boxes[:, 2:] - boxes[:, :2]
    positive = cfg.MODEL.RPN.IOU_THRESHOLDS[-1]

    def fit(candidate: Anchors) -> dict[str, Any]:
        ious = candidate.best_ious(boxes, sizes)
        return {
            "SIZES": [list(level) for level in candidate.sizes],
            "ASPECT_RATIOS": [list(level) for level in dict.fromkeys(candidate.ratios)],
            "best_iou": float(ious.mean()),
            "reach_50": float((ious >= 0.5).mean()),
            "reach_positive": float((ious >= positive).mean()),
        }

    return {
        "boxes": len(boxes),
        "side": _percentiles(np.sqrt(extents.prod(1))),
        "ratio": _percentiles(extents[:, 1] / extents[:, 0]),
        "positive_iou": positive,
        "anchors": fit(anchors),
        "proposal": fit(proposal(boxes, sizes, anchors)),
    }


def anchor_keys(row: Mapping[str, Any]) -> list[str]:
    """Return the ``KEY VALUE`` pairs for an entry of :func:`fit_report`, to be pasted into a command line."""
    return [shell_command([f"MODEL.ANCHOR_GENERATOR.{key}", str(row[key])]) for key in ("SIZES", "ASPECT_RATIOS")]


def _per_level(values: Sequence[Any], levels: int) -> tuple[tuple[float, ...], ...]:
    """Return one list per level; a single list applies to all (Detectron2, modeling/anchor_generator.py:54-77)."""
    nested = values if all(isinstance(level, list | tuple) for level in values) else [values]
    table = tuple(tuple(map(float, level)) for level in nested)
    return table * levels if len(table) == 1 else table


def _resized(width: int, height: int, cfg: CfgNode) -> tuple[int, int]:
    if size := cfg.INPUT.LSJ.SIZE:
        side = size * math.sqrt(math.prod(cfg.INPUT.LSJ.SCALE))
        scale = min(side / width, side / height)
        return max(round(width * scale), 1), max(round(height * scale), 1)
    sides = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    shortest = sum(sides) // 2 if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" else sides[len(sides) // 2]
    new_height, new_width = ShortestEdge.get_output_shape(height, width, shortest, cfg.INPUT.MAX_SIZE_TRAIN)
    return new_width, new_height


def _rounded(ratio: float) -> float:
    """Round a positive ratio to two decimals or, if it is small, to two significant digits, so that it is never 0."""
    return round(ratio, max(2, 1 - math.floor(math.log10(ratio))))


def _clusters(values: np.ndarray, count: int) -> np.ndarray:
    """Return the ascending means of ``count`` clusters of positive numbers: Lloyd's k-means on logarithms."""
    logs = np.sort(np.log(values))
    means = np.quantile(logs, (np.arange(count) + 0.5) / count)
    for _ in range(50):
        groups = np.split(logs, np.searchsorted(logs, (means[1:] + means[:-1]) / 2))
        moved = np.array([group.mean() if len(group) else mean for group, mean in zip(groups, means, strict=True)])
        if np.allclose(moved, means):
            break
        means = moved
    return np.exp(means)


def _percentiles(values: np.ndarray) -> dict[str, float]:
    ranks = (1, 25, 50, 75, 99)
    return dict(zip(map(str, ranks), np.percentile(values, ranks).round(2).tolist(), strict=True))
