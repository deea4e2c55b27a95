"""Outlines of masks as polygons with few points, for annotation programs."""

from itertools import pairwise

import numpy as np
from contourpy import contour_generator

TOLERANCE = 0.9  # pixels that a point of the outline may be away from the polygon: more than the steps of pixels


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Return the outer outline of each part of a mask, the part with the largest area first; holes are filled.

    Args:
        mask: ``(H, W)`` bool.

    Returns:
        Polygons ``(N, 2)`` of x and y, N >= 3, in pixels: the image spans ``[0, W] x [0, H]``. They pass through the
        middle of the edges between pixels of the mask and others, so that the box around them is that of the mask. []
        for an empty mask.
    """
    # Index 1 is the first pixel, whose centre is at 0.5.
    lines = contour_generator(z=np.pad(mask, 1).astype(np.float64), line_type="Separate").lines(0.5)
    rings = [np.asarray(line)[:-1] - 0.5 for line in lines]
    outer = [ring for ring in rings if signed_area(ring) > 0]  # contourpy: the mask is on the left of its lines
    return [simplified(ring) for ring in sorted(outer, key=signed_area, reverse=True)]


def signed_area(ring: np.ndarray) -> float:
    """Return the area of a polygon ``(N, 2)``, positive if its points turn from the x axis towards the y axis."""
    x, y = ring.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def simplified(ring: np.ndarray) -> np.ndarray:
    """Return the points of a polygon that are needed so that the others are within :data:`TOLERANCE` of it.

    The smallest box around the polygon remains the same. Douglas and Peucker, "Algorithms for the reduction of the
    number of points required to represent a digitized line" (1973), between the points on the sides of this box.
    """
    kept = sorted({*ring.argmin(0).tolist(), *ring.argmax(0).tolist()})
    closed = np.concatenate([ring, ring])
    spans = [*pairwise([*kept, kept[0] + len(ring)])]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        side, points = closed[last] - closed[first], closed[first + 1 : last] - closed[first]
        along = np.clip(points @ side / (side @ side), 0, 1)
        distances = np.hypot(*(points - along[:, None] * side).T)
        furthest = int(distances.argmax())
        if distances[furthest] > TOLERANCE:
            middle = first + 1 + furthest
            kept.append(middle)
            spans += [(first, middle), (middle, last)]
    return closed[sorted(kept)]
