"""Pretext tasks: tokens and their layout to losses and accuracies."""

import torch.nn.functional as F
from torch import Tensor, nn

from relvit_d2.errors import UserError
from relvit_d2.pretext.heads import PositionHead, RelationHead
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.relation_loss import relation_loss
from relvit_d2.pretext.targets import position_chance, positions, relation_chance
from relvit_d2.registry import Registry

PRETEXT_TASKS: Registry[type["Task"]] = Registry("pretext task")


class Task(nn.Module):
    """What an entry of ``PRETEXT_TASKS`` is: one head with its loss.

    Args:
        dim: width of a token.
        grid: rows and columns of the grid that tokens come from.
        label_smoothing: share of the target spread evenly over all classes, 0..1.
    """

    def __init__(self, dim: int, grid: tuple[int, int], label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.grid = grid
        self.label_smoothing = label_smoothing

    def forward(self, tokens: Tensor, layout: PatchLayout) -> dict[str, Tensor]:
        """Score ``(B, N, dim)`` tokens: scalar ``loss`` (mean, nats) and ``accuracy`` (0..1, detached)."""
        raise NotImplementedError

    @staticmethod
    def chance(grid: tuple[int, int]) -> float:
        """Accuracy of always naming the most frequent class on a whole grid, 0..1."""
        raise NotImplementedError


@PRETEXT_TASKS.register("relation")
class RelationTask(Task):
    """Which of nine directions every token lies in, seen from every other."""

    def __init__(self, dim: int, grid: tuple[int, int], label_smoothing: float = 0.0) -> None:
        super().__init__(dim, grid, label_smoothing)
        self.head = RelationHead(dim)

    def forward(self, tokens: Tensor, layout: PatchLayout) -> dict[str, Tensor]:
        """Score every ordered pair of valid tokens."""
        queries, keys = self.head(tokens)
        loss, accuracy = relation_loss(queries, keys, layout, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": accuracy}

    @staticmethod
    def chance(grid: tuple[int, int]) -> float:
        """Share of the most frequent relation."""
        return relation_chance(grid).accuracy


@PRETEXT_TASKS.register("position")
class PositionTask(Task):
    """Which cell of the grid every token comes from."""

    def __init__(self, dim: int, grid: tuple[int, int], label_smoothing: float = 0.0) -> None:
        super().__init__(dim, grid, label_smoothing)
        self.head = PositionHead(dim, grid[0] * grid[1])

    def forward(self, tokens: Tensor, layout: PatchLayout) -> dict[str, Tensor]:
        """Score every valid token."""
        if layout.grid != self.grid:
            raise ValueError(f"tokens of a grid {layout.grid} met a position head for {self.grid}")
        scores = self.head(tokens).flatten(0, 1).float()
        target, valid = positions(layout).flatten(), layout.valid.flatten()
        loss = F.cross_entropy(scores, target, reduction="none", label_smoothing=self.label_smoothing)
        count = valid.sum().clamp(min=1)
        hits = (scores.argmax(1) == target) & valid
        return {"loss": loss.masked_fill(~valid, 0).sum() / count, "accuracy": hits.sum() / count}

    @staticmethod
    def chance(grid: tuple[int, int]) -> float:
        """One over the number of cells."""
        return position_chance(grid).accuracy


class PretextTask(nn.Module):
    """The weighted tasks of one encoder, used alike by pre-training and by joint training.

    Args:
        dim: width of a token.
        grid: rows and columns of the grid that tokens come from.
        weights: weight of the loss of each named task; a task of weight 0 is not built.
        label_smoothing: share of every target spread evenly over its classes, 0..1.

    Raises:
        UserError: an unknown task, a negative weight, or no weight above 0.
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], weights: dict[str, float], label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        for name, weight in weights.items():
            if weight < 0:
                raise UserError(f"the weight of pretext task '{name}' is {weight}: give 0 or more")
        kinds = {name: PRETEXT_TASKS[name] for name in weights}
        self.grid = grid
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        if not self.weights:
            raise UserError(f"no pretext task has a weight above 0: give one to {' or '.join(PRETEXT_TASKS)}")
        self.tasks = nn.ModuleDict({name: kinds[name](dim, grid, label_smoothing) for name in self.weights})

    def forward(self, tokens: Tensor, layout: PatchLayout) -> dict[str, Tensor]:
        """Score ``(B, N, dim)`` tokens.

        Returns:
            For each task ``loss_NAME`` (weighted; the losses sum to the total) and ``accuracy_NAME``
            (0..1, detached), scalars.
        """
        scores = {}
        for name, task in self.tasks.items():
            score = task(tokens, layout)
            scores[f"loss_{name}"] = self.weights[name] * score["loss"]
            scores[f"accuracy_{name}"] = score["accuracy"]
        return scores

    def chance(self) -> dict[str, float]:
        """Return each task's accuracy by chance on the whole grid, 0..1, under the task's name."""
        return {name: PRETEXT_TASKS[name].chance(self.grid) for name in self.tasks}
