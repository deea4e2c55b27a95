"""What tells whether pre-training is any good, beside its losses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class FeatureStatistics:
    """Spread of the directions of features, summed up batch by batch.

    Args:
        dim: channels of a feature.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take ``(..., dim)`` features; their lengths do not matter."""
        unit = F.normalize(features.flatten(0, -2).float(), dim=1)
        self.count += len(unit)
        self.sum += unit.sum(0).double().cpu()
        self.products += (unit.mT @ unit).double().cpu()

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        both = FeatureStatistics(len(self.sum))
        both.count, both.sum, both.products = (
            self.count + other.count,
            self.sum + other.sum,
            self.products + other.products,
        )
        return both

    def covariance(self) -> Tensor:
        """Return the ``(dim, dim)`` float64 covariance."""
        mean = self.sum / max(self.count, 1)
        return self.products / max(self.count, 1) - mean[:, None] * mean

    def std(self) -> float:
        """Standard deviation of a channel, in root mean square over channels, times ``sqrt(dim)``.

        0 where all features point one way (collapse), 1 where they point everywhere.
        """
        return math.sqrt(self.covariance().trace().clamp(min=0).item())

    def rank(self) -> float:
        """Effective rank, 1..dim: the exponential of the entropy of the singular values' shares.

        Source: O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007; of
        the centred features.
        """
        values = torch.linalg.eigvalsh(self.covariance()).clamp(min=0).sqrt()
        shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return torch.exp(-torch.xlogy(shares, shares).sum()).item()


def knn_accuracy(
    features: Tensor, labels: Tensor, neighbours: int = 20, known: tuple[Tensor, Tensor] | None = None
) -> float:
    """Return the share, 0..1, of features whose nearest others vote for their label.

    A neighbour votes with the cosine of the two.

    Args:
        features: ``(n, dim)``.
        labels: ``(n,)`` int64 from 0.
        neighbours: how many vote, fewer if there are fewer.
        known: the features ``(m, dim)`` that vote and their labels ``(m,)``; None for leave-one-out: every feature is
            judged by all others.
    """
    unit = F.normalize(features.float(), dim=1)
    voters, theirs = (unit, labels) if known is None else (F.normalize(known[0].float(), dim=1), known[1])
    count = min(neighbours, len(voters) - (known is None))
    hits = 0
    for i in range(0, len(unit), 1024):
        near = unit[i : i + 1024] @ voters.mT
        if known is None:
            near[torch.arange(len(near)), torch.arange(i, i + len(near))] = -math.inf
        cosine, index = near.topk(count)
        votes = near.new_zeros(len(near), int(theirs.max()) + 1).scatter_add_(1, theirs[index], cosine)
        hits += int((votes.argmax(1) == labels[i : i + 1024]).sum())
    return hits / max(len(unit), 1)
