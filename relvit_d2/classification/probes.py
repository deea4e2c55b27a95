"""How much a frozen encoder's features tell of classes: nearest neighbours and a linear probe."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

from relvit_d2.classification.model import ClassificationModel

# Of the weights' square in the probe's loss; the validation images choose.
PENALTIES = tuple(10.0**-power for power in range(1, 7))
STEPS = 200  # of L-BFGS, at most


def features(model: ClassificationModel, batches: Iterable[dict[str, Any]]) -> Tensor:
    """Return the mean token of each image of all processes, ``(n, dim)`` float32 on the CPU.

    Not the class token, which no loss of pre-training sees: it trains all others. Empty in all processes but the first.
    """
    with model.evaluating():
        means = [model.evaluated(batch)[1].float().mean(1).cpu() for batch in batches]
    parts = comm.gather(torch.cat([torch.empty(0, model.encoder.dim), *means]))
    return torch.cat(parts) if parts else torch.empty(0, model.encoder.dim)


def fit_linear(features: Tensor, labels: Tensor, classes: int, penalty: float, start: Tensor | None = None) -> Tensor:
    """Return the softmax regression of labels on features: the least mean cross entropy plus penalty.

    Args:
        features: ``(n, dim)``.
        labels: ``(n,)`` int64.
        classes: how many there are.
        penalty: of half the sum of the squared weights; the bias is free.
        start: a solution to begin at.

    Returns:
        ``(classes, dim + 1)``, the bias last.
    """
    solution = features.new_zeros(classes, features.shape[1] + 1) if start is None else start.clone()
    solution.requires_grad_()
    optimizer = torch.optim.LBFGS([solution], max_iter=STEPS, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(linear_scores(features, solution), labels)
        value = value + penalty / 2 * solution[:, :-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return solution.detach()


def linear_scores(features: Tensor, solution: Tensor) -> Tensor:
    """Return the scores ``(n, classes)`` of features ``(n, dim)`` by a solution of :func:`fit_linear`."""
    return torch.addmm(solution[:, -1], features, solution[:, :-1].mT)


def linear_probe(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int
) -> dict[str, float]:
    """Fit on ``train`` with each of ``PENALTIES``, choose by ``validation``, look at ``test`` once.

    Args:
        train, validation, test: features ``(n, dim)`` and labels ``(n,)`` int64.
        classes: how many there are.

    Returns:
        ``top1`` and ``validation_top1``, percent of right answers, and ``penalty``.
    """
    mean, std = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    known, held, unseen = (((part[0] - mean) / std) for part in (train, validation, test))
    best: tuple[float, float, Tensor] | None = None
    solution = None
    for penalty in PENALTIES:
        solution = fit_linear(known, train[1], classes, penalty, solution)
        right = _top1(linear_scores(held, solution), validation[1])
        if best is None or right > best[0]:
            best = right, penalty, solution
    assert best is not None
    right, penalty, solution = best
    return {"top1": _top1(linear_scores(unseen, solution), test[1]), "validation_top1": right, "penalty": penalty}


def _top1(scores: Tensor, labels: Tensor) -> float:
    return 100 * (scores.argmax(1) == labels).float().mean().item()
