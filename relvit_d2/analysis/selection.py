"""Selection of the images to label next, by coverage of the feature space."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

CANDIDATES = 5  # times as many of the most uncertain images are candidates


class Chosen(NamedTuple):
    """A chosen image.

    Attributes:
        image: index of the image.
        nearest: index of the nearest image among the labelled and earlier chosen ones; None for a first image.
        distance: cosine distance to it, 0..2.
    """

    image: int
    nearest: int | None
    distance: float


def k_centre(
    features: np.ndarray,
    count: int,
    labelled: Collection[int] = (),
    groups: Sequence[Sequence[int]] = (),
    uncertainty: np.ndarray | None = None,
) -> list[Chosen]:
    """Choose images one after another, each the farthest from all labelled and chosen ones.

    This is greedy k-centre selection (Sener and Savarese, "Active Learning for Convolutional Neural Networks: A
    Core-Set Approach", ICLR 2018). Without labelled images the first is that nearest to the mean.

    Args:
        features: ``(N, dim)`` of all images.
        count: number of images to choose; fewer if there are not as many.
        labelled: indices of images that need no label.
        groups: indices of nearly equal images in groups; of a group at most one is labelled or chosen.
        uncertainty: ``(N,)``; only the ``CANDIDATES * count`` images of the highest uncertainty can be chosen.
    """
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    group = np.arange(len(unit))
    for members in groups:
        group[list(members)] = members[0]
    free = ~np.isin(group, group[list(labelled)])
    if uncertainty is not None:
        order = np.argsort(-np.where(free, uncertainty, -np.inf), kind="stable")
        free[order[CANDIDATES * count :]] = False
    distance = np.full(len(unit), np.inf, np.float32)
    nearest = np.full(len(unit), -1)

    def add(centre: int) -> None:
        new = 1 - unit @ unit[centre]
        closer = new < distance
        distance[closer], nearest[closer] = new[closer], centre
        free[group == group[centre]] = False

    for centre in labelled:
        add(centre)
    chosen: list[Chosen] = []
    while len(chosen) < count and free.any():
        known = nearest[0] >= 0
        score = distance if known else unit @ unit.mean(0)
        index = int(np.where(free, score, -np.inf).argmax())
        chosen.append(Chosen(index, int(nearest[index]), float(distance[index])) if known else Chosen(index, None, 0.0))
        add(index)
    return chosen
