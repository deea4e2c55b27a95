"""Feature statistics: standard deviation, effective rank, k-NN accuracy."""

import numpy as np
import pytest
import torch

from relvit_d2.pretext.monitor import FeatureStatistics, knn_accuracy


def statistics_of(features: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(7):
        statistics.update(part)
    return statistics


def test_standard_deviation_and_rank_equal_those_of_the_whole_matrix() -> None:
    """Computed by NumPy from all features at once."""
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([5.0, 3, 2, 1, 1, 0])
    )
    unit = features.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    shares = np.linalg.svd(centred, compute_uv=False)[:5]
    shares /= shares.sum()
    statistics = statistics_of(features)
    assert statistics.std() == pytest.approx(np.sqrt((centred**2).sum(1).mean()), rel=1e-5)
    assert statistics.rank() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)


def test_statistics_are_additive() -> None:
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    both = statistics_of(features[:13])
    both += statistics_of(features[13:])
    assert both.std() == pytest.approx(statistics_of(features).std())
    assert both.rank() == pytest.approx(statistics_of(features).rank())


def test_statistics_of_collapsed_and_of_uniform_features() -> None:
    same = statistics_of(torch.ones(30, 8) * torch.rand(30, 1))
    assert same.std() == pytest.approx(0, abs=1e-3)
    everywhere = statistics_of(torch.cat((torch.eye(8), -torch.eye(8))))
    assert everywhere.std() == pytest.approx(1) and everywhere.rank() == pytest.approx(8)


def test_knn_accuracy_of_clusters_and_of_shuffled_labels() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(4).repeat_interleave(30)
    centres = torch.randn(4, 16, generator=generator)
    features = centres[labels] + 0.1 * torch.randn(120, 16, generator=generator)
    assert knn_accuracy(features, labels) == 1
    shuffled = labels[torch.randperm(120, generator=generator)]
    assert knn_accuracy(features, shuffled) < 0.5


def test_a_feature_is_not_its_own_neighbour() -> None:
    """Every label occurs once."""
    assert knn_accuracy(torch.eye(5) + 0.1, torch.arange(5)) == 0
