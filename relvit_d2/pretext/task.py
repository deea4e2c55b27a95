"""Pretext tasks: losses and metrics of tokens and their layout."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from relvit_d2.pretext.heads import PairHead
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.pair_loss import Bearing, PairKind, Relation, SquaredError, pair_loss
from relvit_d2.pretext.targets import pair_angle, pair_deviation, pair_distance, positions, relation_frequencies
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import Metric
from relvit_d2.utils.registry import Registry

PRETEXT_TASKS: Registry[type["Task"]] = Registry("pretext task")


@dataclass(frozen=True)
class LossConfig:
    """Settings of all losses.

    Attributes:
        label_smoothing: of every cross entropy, 0..1.
        pair_dropout: fraction of the pairs that a training loss omits, 0 or more and less than 1.
    """

    label_smoothing: float = 0.0
    pair_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise UserError(f"PRETEXT.LABEL_SMOOTHING {self.label_smoothing} is out of range: give 0 to 1")
        if not 0 <= self.pair_dropout < 1:
            raise UserError(f"PRETEXT.PAIR_DROPOUT {self.pair_dropout} is out of range: give 0 or more, less than 1")


DEFAULT = LossConfig()


class Task(nn.Module):
    """Base class of the entries of ``PRETEXT_TASKS``: a head with its loss.

    Args:
        dim: width of a token.
        grid: rows and columns of the grid of positions.
        config: settings of the loss.

    Attributes:
        measure: kind of the metric (:class:`relvit_d2.utils.metrics.Metric`).
    """

    measure: ClassVar[str] = "accuracy"

    def __init__(self, dim: int, grid: tuple[int, int], config: LossConfig = DEFAULT) -> None:
        super().__init__()
        self.grid, self.config = grid, config

    def forward(self, tokens: Tensor, layout: PatchLayout) -> tuple[Tensor, Tensor]:
        """Return the mean loss and the metric (no gradient) of ``(B, N, dim)`` tokens, scalars."""
        raise NotImplementedError

    def chance(self, grid: tuple[int, int], tokens: int | None = None) -> float:
        """Return the metric of the best constant prediction for images of ``grid`` rows and columns.

        With ``tokens``, for a random subset of that many tokens of each image.
        """
        raise NotImplementedError


class PairTask(Task):
    """Base class of tasks on all ordered pairs of valid tokens."""

    kind: PairKind

    def __init__(self, dim: int, grid: tuple[int, int], config: LossConfig = DEFAULT) -> None:
        super().__init__(dim, grid, config)
        self.head = PairHead(dim, self.kind.maps)

    def forward(self, tokens: Tensor, layout: PatchLayout) -> tuple[Tensor, Tensor]:
        queries, keys = self.head(tokens)
        return pair_loss(queries, keys, layout, self.kind, self.config.pair_dropout if self.training else 0.0)

    def chance(self, grid: tuple[int, int], tokens: int | None = None) -> float:
        return pair_deviation(self.kind.target, grid, tokens)


@PRETEXT_TASKS.register("relation")
class RelationTask(PairTask):
    """Classification of each pair's relative position, one of nine."""

    def __init__(self, dim: int, grid: tuple[int, int], config: LossConfig = DEFAULT) -> None:
        self.kind = Relation(config.label_smoothing)
        super().__init__(dim, grid, config)

    def chance(self, grid: tuple[int, int], tokens: int | None = None) -> float:
        return max(relation_frequencies(grid, tokens))


@PRETEXT_TASKS.register("position")
class PositionTask(Task):
    """Classification of each token's cell of ``grid``, which covers images of any size."""

    def __init__(self, dim: int, grid: tuple[int, int], config: LossConfig = DEFAULT) -> None:
        super().__init__(dim, grid, config)
        self.head = nn.Linear(dim, grid[0] * grid[1])  # authors' code, models/relvit.py:149

    def forward(self, tokens: Tensor, layout: PatchLayout) -> tuple[Tensor, Tensor]:
        scores = self.head(tokens).flatten(0, 1).float()
        target, valid = positions(layout, self.grid).flatten(), layout.valid.flatten()
        loss = F.cross_entropy(scores, target, reduction="none", label_smoothing=self.config.label_smoothing)
        count = valid.sum().clamp(min=1)
        hits = (scores.argmax(1) == target) & valid
        return loss.masked_fill(~valid, 0).sum() / count, hits.sum() / count

    def chance(self, grid: tuple[int, int], tokens: int | None = None) -> float:
        return 1 / (self.grid[0] * self.grid[1])  # every cell is equally frequent


@PRETEXT_TASKS.register("distance")
class DistanceTask(PairTask):
    """Regression of each pair's distance."""

    kind = SquaredError(pair_distance)
    measure = "error"


@PRETEXT_TASKS.register("angle")
class AngleTask(PairTask):
    """Regression of the authors' angle of each pair."""

    kind = SquaredError(pair_angle)
    measure = "error"


@PRETEXT_TASKS.register("bearing")
class BearingTask(PairTask):
    """Regression of each pair's direction as an angle."""

    kind = Bearing()
    measure = "error"

    def chance(self, grid: tuple[int, int], tokens: int | None = None) -> float:
        return 0.5  # half turns; opposite bearings are equally frequent


class PretextTask(nn.Module):
    """Weighted pretext tasks on the tokens of an encoder, for pre-training and joint training.

    Args:
        dim: width of a token.
        grid: rows and columns of the grid of positions.
        weights: loss weight of each task by name; tasks of weight 0 are not built.
        config: settings of the losses.
        pool: stride of the average pooling before the heads, 1 (none) or 2 (:meth:`pooled`).

    Raises:
        UserError: a task is unknown, a weight is negative, or none is positive.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        weights: dict[str, float],
        config: LossConfig = DEFAULT,
        pool: int = 1,
    ) -> None:
        super().__init__()
        self.pool = pool
        for name, weight in weights.items():
            if weight < 0:
                raise UserError(f"the weight of pretext task '{name}' is {weight}: give 0 or more")
        kinds = {name: PRETEXT_TASKS[name] for name in weights}
        self.grid = grid
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        if not self.weights:
            raise UserError(f"no pretext task has a weight above 0: give one to {' or '.join(PRETEXT_TASKS)}")
        self.tasks = nn.ModuleDict({name: kinds[name](dim, grid, config) for name in self.weights})

    def forward(
        self, tokens: Tensor, layout: PatchLayout, grids: Sequence[tuple[int, int]] = ()
    ) -> dict[str, Tensor | Metric[Any]]:
        """Compute the losses and metrics of ``(B, N, dim)`` tokens.

        Args:
            tokens: as for :meth:`Task.forward`.
            layout: as for :meth:`Task.forward`.
            grids: rows and columns of each image, if they differ from the grid of positions. Error metrics then have no
                chance level, which is slow to compute for many grids.

        Returns:
            For each task ``loss_NAME``, a weighted scalar, and ``NAME``, the metric: a scalar without gradient and its
            chance level, the mean over the images.
        """
        scores: dict[str, Tensor | Metric[Any]] = {}
        count = None if grids else layout.row.shape[1]
        for name, task in self.named_tasks():
            loss, measure = task(tokens, layout)
            scores[f"loss_{name}"] = self.weights[name] * loss
            known = not grids or task.measure == "accuracy"
            chance = fmean(task.chance(grid, count) for grid in grids or [self.grid]) if known else None
            scores[name] = Metric(measure, chance, task.measure)
        return scores

    def pooled(self, last: Tensor, extents: Tensor | None = None) -> tuple[Tensor, PatchLayout]:
        """Return the tokens of an encoder's last map, pooled, and their layout in unpermuted images.

        With ``pool`` 2 the map is average-pooled, 3 x 3 with stride 2 and without padding pixels (the authors' code for
        T2T, models/relvit.py:151-152,203-207).

        Args:
            last: ``(B, dim, h, w)``.
            extents: ``(B, 2)`` integer rows and columns of each image on the map; None: the whole map.

        Returns:
            ``(B, N, dim)`` in row-major order, and the layout; tokens outside an image are invalid.
        """
        grid = last.shape[2], last.shape[3]
        extents = PatchLayout.full(len(last), grid, last.device).extent if extents is None else extents
        layout = PatchLayout.padded(grid, extents)
        if self.pool == 2:
            inside = layout.valid.view(-1, 1, *layout.grid).to(last.dtype)
            sums, counts = (F.avg_pool2d(x, 3, 2, 1) for x in (last * inside, inside))
            last = sums / counts.clamp(min=1 / 9)
            layout = PatchLayout.padded((last.shape[2], last.shape[3]), (extents + 1) // 2)
        return last.flatten(2).mT, layout

    @classmethod
    def from_keys(cls, dim: int, grid: tuple[int, int], keys: Mapping[str, Any]) -> "PretextTask":
        """Build the tasks from the config node ``PRETEXT``."""
        weights = {name.lower(): weight for name, weight in keys["WEIGHTS"].items()}
        return cls(dim, grid, weights, LossConfig(keys["LABEL_SMOOTHING"], keys["PAIR_DROPOUT"]), pooling(keys))

    def named_tasks(self) -> Iterator[tuple[str, Task]]:
        """Yield the tasks by name."""
        for name, task in self.tasks.items():
            assert isinstance(task, Task)
            yield name, task


def pooling(keys: Mapping[str, Any]) -> int:
    """Return ``POOL`` of the config node ``PRETEXT``; raise a :class:`UserError` unless it is 1 or 2."""
    if keys["POOL"] not in (1, 2):
        raise UserError(f"PRETEXT.POOL {keys['POOL']} is not supported; give 1 or 2")
    return int(keys["POOL"])
