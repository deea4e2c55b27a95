"""Pretext tasks: tokens and their layout to losses and accuracies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relvit_d2.pretext.heads import PairHead
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.pair_loss import Angle, Bearing, Distance, PairKind, Relation, pair_loss
from relvit_d2.pretext.targets import pair_deviation, position_chance, positions, relation_chance
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import Metric
from relvit_d2.utils.registry import Registry

PRETEXT_TASKS: Registry[type["Task"]] = Registry("pretext task")


@dataclass(frozen=True)
class LossConfig:
    """What all tasks' losses share.

    Attributes:
        label_smoothing: share of the target spread evenly over all classes, 0..1, of every cross entropy.
        pair_dropout: share of the pairs that a training loss leaves out, 0..1.

    Raises:
        UserError: a share outside its range.
    """

    label_smoothing: float = 0.0
    pair_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise UserError(f"PRETEXT.LABEL_SMOOTHING {self.label_smoothing} is no share: give 0 to 1")
        if not 0 <= self.pair_dropout < 1:
            raise UserError(f"PRETEXT.PAIR_DROPOUT {self.pair_dropout} leaves no pair: give 0 or more, less than 1")


DEFAULT = LossConfig()


class Task(nn.Module):
    """What an entry of ``PRETEXT_TASKS`` is: one head with its loss.

    Args:
        dim: width of a token.
        grid: rows and columns that positions are told in.
        config: what all tasks share.

    Attributes:
        measure: the kind of the metric beside the loss (:class:`relvit_d2.utils.metrics.Metric`).
    """

    measure: ClassVar[str] = "accuracy"

    def __init__(self, dim: int, grid: tuple[int, int], config: LossConfig = DEFAULT) -> None:
        super().__init__()
        self.grid, self.config = grid, config

    def forward(self, tokens: Tensor, layout: PatchLayout) -> tuple[Tensor, Tensor]:
        """Score ``(B, N, dim)`` tokens: the mean loss and the measure (no gradient), scalars."""
        raise NotImplementedError

    def chance(self, grid: tuple[int, int]) -> float:
        """Return the measure of the best constant answer for whole images of ``grid`` rows and columns."""
        raise NotImplementedError


class PairTask(Task):
    """A question about every ordered pair of valid tokens."""

    kind: PairKind

    def __init__(self, dim: int, grid: tuple[int, int], config: LossConfig = DEFAULT) -> None:
        super().__init__(dim, grid, config)
        self.head = PairHead(dim, self.kind.maps)

    def forward(self, tokens: Tensor, layout: PatchLayout) -> tuple[Tensor, Tensor]:
        """See :class:`Task`."""
        queries, keys = self.head(tokens)
        return pair_loss(queries, keys, layout, self.kind, self.config.pair_dropout if self.training else 0.0)

    def chance(self, grid: tuple[int, int]) -> float:
        """See :class:`Task`."""
        return pair_deviation(self.kind.target, grid)


@PRETEXT_TASKS.register("relation")
class RelationTask(PairTask):
    """Which of nine directions every token lies in, seen from every other."""

    def __init__(self, dim: int, grid: tuple[int, int], config: LossConfig = DEFAULT) -> None:
        self.kind = Relation(config.label_smoothing)
        super().__init__(dim, grid, config)

    def chance(self, grid: tuple[int, int]) -> float:
        """Share of the most frequent relation."""
        return relation_chance(grid).accuracy


@PRETEXT_TASKS.register("position")
class PositionTask(Task):
    """Which cell of the ``grid`` every token comes from, be the image's own grid that one or another."""

    def __init__(self, dim: int, grid: tuple[int, int], config: LossConfig = DEFAULT) -> None:
        super().__init__(dim, grid, config)
        self.head = nn.Linear(dim, grid[0] * grid[1])  # authors' code, models/relvit.py:149

    def forward(self, tokens: Tensor, layout: PatchLayout) -> tuple[Tensor, Tensor]:
        """Score every valid token."""
        scores = self.head(tokens).flatten(0, 1).float()
        target, valid = positions(layout, self.grid).flatten(), layout.valid.flatten()
        loss = F.cross_entropy(scores, target, reduction="none", label_smoothing=self.config.label_smoothing)
        count = valid.sum().clamp(min=1)
        hits = (scores.argmax(1) == target) & valid
        return loss.masked_fill(~valid, 0).sum() / count, hits.sum() / count

    def chance(self, grid: tuple[int, int]) -> float:
        """One over the number of cells, whatever grid the tokens come from."""
        return position_chance(self.grid).accuracy


@PRETEXT_TASKS.register("distance")
class DistanceTask(PairTask):
    """How far apart every two tokens are."""

    kind = Distance()
    measure = "error"


@PRETEXT_TASKS.register("angle")
class AngleTask(PairTask):
    """The authors' angle between every two tokens."""

    kind = Angle()
    measure = "error"


@PRETEXT_TASKS.register("bearing")
class BearingTask(PairTask):
    """In which direction every token lies from every other."""

    kind = Bearing()
    measure = "error"

    def chance(self, grid: tuple[int, int]) -> float:
        """Half of a half turn: opposite bearings are equally frequent."""
        return 0.5


class PretextTask(nn.Module):
    """The weighted tasks of one encoder, used alike by pre-training and by joint training.

    Args:
        dim: width of a token.
        grid: rows and columns that positions are told in.
        weights: weight of the loss of each named task; a task of weight 0 is not built.
        config: what the losses share.
        pool: 1, or 2 for heads that read every second token of the average over 3 x 3 (:meth:`pooled`).

    Raises:
        UserError: an unknown task, a negative weight, or no weight above 0.
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
        """Score ``(B, N, dim)`` tokens.

        Args:
            tokens: the encoder's tokens.
            layout: their true positions.
            grids: rows and columns of each whole image, if they differ from the grid of the positions. The chance of
                an error, which is slow to compute for many grids, is left out then.

        Returns:
            For each task ``loss_NAME``, a scalar (weighted; the losses sum to the total), and ``NAME``, the metric:
            its value is a scalar without a gradient, its chance a float, the mean over the images.
        """
        scores: dict[str, Tensor | Metric[Any]] = {}
        for name, task in self.named_tasks():
            loss, measure = task(tokens, layout)
            scores[f"loss_{name}"] = self.weights[name] * loss
            known = not grids or task.measure == "accuracy"
            chance = fmean(map(task.chance, grids or [self.grid])) if known else None
            scores[name] = Metric(measure, chance, task.measure)
        return scores

    def pooled(self, last: Tensor, extents: Tensor | None = None) -> tuple[Tensor, PatchLayout]:
        """Return the tokens that the heads read of an encoder's last map, and their layout in unpermuted images.

        With ``pool`` 2 a token is the mean of the 3 x 3 around every second one, without what lies outside the image
        (the authors' code for T2T, models/relvit.py:151-152,203-207).

        Args:
            last: ``(B, dim, h, w)``.
            extents: ``(B, 2)`` integer rows and columns that each image covers of the map; None for all.

        Returns:
            ``(B, N, dim)``, row by row, and the layout, in which tokens outside an image are invalid.
        """
        extents = torch.tensor([last.shape[2:]] * len(last), device=last.device) if extents is None else extents
        layout = PatchLayout.padded((last.shape[2], last.shape[3]), extents)
        if self.pool == 2:
            inside = layout.valid.view(-1, 1, *layout.grid).to(last.dtype)
            sums, counts = (F.avg_pool2d(x, 3, 2, 1) for x in (last * inside, inside))
            last = sums / counts.clamp(min=1 / 9)
            layout = PatchLayout.padded((last.shape[2], last.shape[3]), (extents + 1) // 2)
        return last.flatten(2).mT, layout

    @classmethod
    def from_keys(cls, dim: int, grid: tuple[int, int], keys: Mapping[str, Any]) -> "PretextTask":
        """Build the tasks that the config node ``PRETEXT`` describes."""
        weights = {name.lower(): weight for name, weight in keys["WEIGHTS"].items()}
        return cls(dim, grid, weights, LossConfig(keys["LABEL_SMOOTHING"], keys["PAIR_DROPOUT"]), pooling(keys))

    def named_tasks(self) -> Iterator[tuple[str, Task]]:
        """Walk the tasks that are built."""
        for name, task in self.tasks.items():
            assert isinstance(task, Task)
            yield name, task


def pooling(keys: Mapping[str, Any]) -> int:
    """Return ``POOL`` of the config node ``PRETEXT``.

    Raises:
        UserError: unless it is 1 or 2.
    """
    if keys["POOL"] not in (1, 2):
        raise UserError(f"PRETEXT.POOL {keys['POOL']} is not supported; give 1 or 2")
    return int(keys["POOL"])
