"""Areas and overlaps of boxes."""

import numpy as np


def intersection(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the areas of the intersections of XYXY boxes, which broadcast: ``(..., 4)`` to ``(...)``."""
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    return sides.clip(min=0).prod(axis=-1)


def area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas of XYXY boxes ``(..., 4)``."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of XYXY boxes, which broadcast; 0 without intersection."""
    common = intersection(boxes, others)
    union = area(boxes) + area(others) - common
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)
