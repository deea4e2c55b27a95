"""Statistics of features, to monitor pre-training."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class FeatureStatistics:
    """Spread of the directions of features, accumulated over batches.

    Args:
        dim: channels of a feature.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add ``(..., dim)`` features; they are normalised to unit length."""
        unit = F.normalize(features.flatten(0, -2).float(), dim=1)
        self.count += len(unit)
        self.sum += unit.sum(0).double().cpu()
        self.products += (unit.mT @ unit).double().cpu()

    def __iadd__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        self.count += other.count
        self.sum += other.sum
        self.products += other.products
        return self

    def covariance(self) -> Tensor:
        """Return the ``(dim, dim)`` float64 covariance."""
        mean = self.sum / max(self.count, 1)
        return self.products / max(self.count, 1) - mean[:, None] * mean

    def std(self) -> float:
        """Return the standard deviation of the unit features: the square root of the covariance's trace, 0..1.

        0 if all features have one direction (collapse), 1 if their mean is zero.
        """
        return math.sqrt(self.covariance().trace().clamp(min=0).item())

    def rank(self) -> float:
        """Return the effective rank of the centred unit features, 1..dim.

        The exponential of the entropy of the normalised singular values (O. Roy and M. Vetterli, "The effective rank: a
        measure of effective dimensionality", EUSIPCO 2007).
        """
        values = torch.linalg.eigvalsh(self.covariance()).clamp(min=0).sqrt()
        fractions = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return torch.exp(-torch.xlogy(fractions, fractions).sum()).item()


def knn_accuracy(
    features: Tensor, labels: Tensor, neighbours: int = 20, known: tuple[Tensor, Tensor] | None = None
) -> float:
    """Return the k-NN accuracy of features, 0..1, with votes weighted by cosine similarity.

    Args:
        features: ``(n, dim)``.
        labels: ``(n,)`` int64 from 0.
        neighbours: k; fewer if there are fewer features.
        known: training features ``(m, dim)`` and their labels ``(m,)``; None for leave-one-out on ``features``.
    """
    unit = F.normalize(features.float(), dim=1)
    train, train_labels = (unit, labels) if known is None else (F.normalize(known[0].float(), dim=1), known[1])
    count = min(neighbours, len(train) - (known is None))
    hits = 0
    for i in range(0, len(unit), 1024):
        similarity = unit[i : i + 1024] @ train.mT
        if known is None:
            similarity.diagonal(i).fill_(-math.inf)
        cosine, index = similarity.topk(count)
        votes = cosine.new_zeros(len(cosine), int(train_labels.max()) + 1).scatter_add_(1, train_labels[index], cosine)
        hits += int((votes.argmax(1) == labels[i : i + 1024]).sum())
    return hits / max(len(unit), 1)
