"""Classification with the features of a frozen encoder: nearest neighbours and a linear probe."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from torch import Tensor

from relvit_d2.classification.model import ClassificationModel

# L2 penalties of the linear probe; the best is selected on the validation images.
PENALTIES = tuple(10.0**-power for power in range(1, 7))
STEPS = 200  # maximum number of L-BFGS iterations


def features(model: ClassificationModel, batches: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return the mean patch token of each image, ``(n, dim)`` float32, and its ``keys``, ``(n,)`` int64, on the CPU.

    They are those of the batches of all processes. The class token is not used because pre-training does not train it.
    Empty in all processes but the first.
    """
    means, keys = [torch.empty(0, model.encoder.dim)], [torch.empty(0, dtype=torch.int64)]
    with inference_context(model):
        for batch in batches:
            means.append(model.evaluated(batch)[1].float().mean(1).cpu())
            keys.append(batch["keys"])
    parts = comm.gather((torch.cat(means), torch.cat(keys))) or [(means[0], keys[0])]
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])


def fit_linear(features: Tensor, labels: Tensor, classes: int, penalty: float, start: Tensor | None = None) -> Tensor:
    """Fit a softmax regression by minimising the mean cross entropy plus an L2 penalty.

    Args:
        features: ``(n, dim)``.
        labels: ``(n,)`` int64.
        penalty: factor of half the sum of the squared weights, without the bias.
        start: initial solution; None: zeros.

    Returns:
        ``(classes, dim + 1)``, the bias in the last column.
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
    """Return the scores ``(n, classes)`` of features ``(n, dim)`` for a solution of :func:`fit_linear`."""
    return torch.addmm(solution[:, -1], features, solution[:, :-1].mT)


def linear_probe(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int
) -> dict[str, float]:
    """Fit on ``train`` with each of ``PENALTIES``, select the best on ``validation``, evaluate it on ``test``.

    Args:
        train, validation, test: features ``(n, dim)`` and labels ``(n,)`` int64.

    Returns:
        ``top1`` and ``validation_top1``, accuracies in percent, and ``penalty``.
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
