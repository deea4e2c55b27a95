"""How well anchors fit the boxes of a data set at the size it is trained at, and which would fit better."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from relvit_d2.data.detection.mapper import ShortestEdge

SAMPLE = 20_000
"""Most boxes that are looked at, spread evenly: a share of them is known to a third of a percent then."""

_BASES = 2.0 ** np.arange(0, 5.01, 0.25)
"""Anchor sizes over strides that are tried, 1 to 32; Detectron2's default is 8."""


@dataclass(frozen=True)
class Anchors:
    """Anchors of a detector.

    Attributes:
        strides: pixels between the anchors of each level.
        sizes: square roots of the anchors' areas in pixels, level by level.
        ratios: heights over widths, level by level.
        offset: of the first anchor's centre from the image's corner, in strides.
    """

    strides: tuple[int, ...]
    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[tuple[float, ...], ...]
    offset: float

    @classmethod
    def of(cls, cfg: CfgNode) -> "Anchors | None":
        """Return the anchors of a config, None where the names of its maps do not tell their strides."""
        levels = [re.fullmatch(r"p(\d+)", name) for name in cfg.MODEL.RPN.IN_FEATURES]
        strides = tuple(2 ** int(level[1]) for level in levels if level)
        node = cfg.MODEL.ANCHOR_GENERATOR
        sizes, ratios = (_per_level(values, len(strides)) for values in (node.SIZES, node.ASPECT_RATIOS))
        if len(strides) != len(levels) or not len(strides) == len(sizes) == len(ratios):
            return None
        return cls(strides, sizes, ratios, node.OFFSET)

    def best_ious(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return for every box its greatest IoU with an anchor, as Detectron2 lays them.

        Args:
            boxes: (N, 4) XYXY in pixels.
            sizes: (N, 2) width and height of each box's image.

        Returns:
            (N,) in 0..1.
        """
        best = np.zeros(len(boxes))
        middles, extents = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        for stride, level_sizes, ratios in zip(self.strides, self.sizes, self.ratios, strict=True):
            # Of equal anchors the nearest one overlaps most.
            cells = np.clip(np.rint(middles / stride - self.offset), 0, np.ceil(sizes / stride) - 1)
            shifts = np.abs((cells + self.offset) * stride - middles)
            for size in level_sizes:
                for ratio in ratios:
                    anchor = np.array([size / math.sqrt(ratio), size * math.sqrt(ratio)])
                    meet = np.minimum(np.minimum(extents, anchor), (extents + anchor) / 2 - shifts).clip(0).prod(1)
                    best = np.maximum(best, meet / (extents.prod(1) + size * size - meet))
        return best


def training_boxes(boxes: np.ndarray, sizes: np.ndarray, cfg: CfgNode) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes and image sizes as training sees them: resized, not cropped.

    Of several training sizes (``INPUT.MIN_SIZE_TRAIN``, ``INPUT.LSJ.SCALE``) the one in the middle is taken.

    Args:
        boxes: (N, 4) XYXY in pixels.
        sizes: (N, 2) width and height of each box's image.
        cfg: for the keys under ``INPUT``.
    """
    shapes, inverse = np.unique(sizes, axis=0, return_inverse=True)
    resized = np.array([_resized(int(width), int(height), cfg) for width, height in shapes], dtype=np.float64)
    new = resized.reshape(-1, 2)[inverse.reshape(-1)]
    return boxes * np.tile(new / sizes, 2), new


def proposal(boxes: np.ndarray, sizes: np.ndarray, anchors: Anchors) -> Anchors:
    """Return the anchors, as many as given ones, that fit the boxes best, of those tried: the mean best IoU decides.

    Ratios are the means of clusters of the boxes' own. Sizes are tried that double from level to level, and the means
    of clusters of the boxes' own.
    """
    extents = boxes[:, 2:] - boxes[:, :2]
    count = len(anchors.ratios[0])
    ratios = tuple(_rounded(value) for value in _clusters(extents[:, 1] / extents[:, 0], count).tolist())
    per_level, levels = len(anchors.sizes[0]), len(anchors.strides)
    inner = 2.0 ** (np.arange(per_level) / per_level)
    ladders = [np.outer(np.array(anchors.strides) * base, inner) for base in _BASES]
    own = _clusters(np.sqrt(extents.prod(1)), levels * per_level).reshape(levels, per_level)
    best, fit = anchors, float(anchors.best_ious(boxes, sizes).mean())
    for table in (*ladders, own):
        rounded = tuple(tuple(float(max(round(size), 1)) for size in level) for level in table.tolist())
        tried = Anchors(anchors.strides, rounded, (ratios,) * levels, anchors.offset)
        if (mean := float(tried.best_ious(boxes, sizes).mean())) > fit:
            best, fit = tried, mean
    return best


def fit_report(boxes: np.ndarray, sizes: np.ndarray, cfg: CfgNode) -> dict[str, Any]:
    """Return how the boxes of a data set lie to a config's anchors, as plain data.

    Args:
        boxes: (N, 4) XYXY in pixels, each of some area.
        sizes: (N, 2) width and height of each box's image.
        cfg: for the training size and the anchors.

    Returns:
        Empty without a box, or where the config's anchors are unknown. Else ``side``: quantiles of the square root of
        a box's area at training size, in pixels; ``ratio``: of height over width; ``anchors`` and ``proposal``, each
        ``SIZES``, ``ASPECT_RATIOS``, the mean ``best_iou`` and the shares of boxes that some anchor overlaps by 0.5
        (``reach_50``) and by the IoU that makes it a positive one (``reach_positive``).
    """
    anchors = Anchors.of(cfg)
    if anchors is None or not len(boxes):
        return {}
    step = math.ceil(len(boxes) / SAMPLE)
    boxes, sizes = training_boxes(boxes[::step], sizes[::step], cfg)
    extents = boxes[:, 2:] - boxes[:, :2]
    positive = cfg.MODEL.RPN.IOU_THRESHOLDS[-1]

    def judged(candidate: Anchors) -> dict[str, Any]:
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
        "side": _quantiles(np.sqrt(extents.prod(1))),
        "ratio": _quantiles(extents[:, 1] / extents[:, 0]),
        "positive_iou": positive,
        "anchors": judged(anchors),
        "proposal": judged(proposal(boxes, sizes, anchors)),
    }


def _per_level(values: Sequence[Any], levels: int) -> tuple[tuple[float, ...], ...]:
    """Return one list for each level; a single one is for all (Detectron2, modeling/anchor_generator.py:54-77)."""
    nested = values if all(isinstance(level, list | tuple) for level in values) else [values]
    table = tuple(tuple(map(float, level)) for level in nested)
    return table * levels if len(table) == 1 else table


def _resized(width: int, height: int, cfg: CfgNode) -> tuple[int, int]:
    if size := cfg.INPUT.LSJ.SIZE:
        side = size * math.sqrt(math.prod(cfg.INPUT.LSJ.SCALE))
        scale = min(side / width, side / height)
        return max(round(width * scale), 1), max(round(height * scale), 1)
    given = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    shortest = sum(given) // 2 if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" else given[len(given) // 2]
    new_height, new_width = ShortestEdge.get_output_shape(height, width, shortest, cfg.INPUT.MAX_SIZE_TRAIN)
    return new_width, new_height


def _rounded(ratio: float) -> float:
    """Return a positive ratio with two decimals, a small one with two significant digits: never 0."""
    return round(ratio, max(2, 1 - math.floor(math.log10(ratio))))


def _clusters(values: np.ndarray, count: int) -> np.ndarray:
    """Return the ascending means of ``count`` clusters of positive numbers: Lloyd's k-means of their logarithms."""
    logs = np.sort(np.log(values))
    means = np.quantile(logs, (np.arange(count) + 0.5) / count)
    for _ in range(50):
        groups = np.split(logs, np.searchsorted(logs, (means[1:] + means[:-1]) / 2))
        moved = np.array([group.mean() if len(group) else mean for group, mean in zip(groups, means, strict=True)])
        if np.allclose(moved, means):
            break
        means = moved
    return np.exp(means)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    shares = (1, 25, 50, 75, 99)
    return dict(zip(map(str, shares), np.percentile(values, shares).round(2).tolist(), strict=True))
