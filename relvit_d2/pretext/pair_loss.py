"""Losses over all ordered pairs of tokens in memory that grows with N, not with N^2.

The scores of a pair decide its loss alone, so the pairs are walked block by block of query rows. Each block's gradient
is formed at once, while its scores are at hand; only the gradients of the queries and keys, shaped like them, wait for
the backward pass.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.targets import (
    PairFunction,
    all_pairs,
    pair_angle,
    pair_bearing,
    pair_distance,
    pair_relation,
)
from relvit_d2.utils.hashing import hashed_uniform

CLASSES = 9
# Scores of one block. On a CPU they should stay in its cache; on a GPU a block should be large
# enough to hide the cost of launching kernels.
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**27}


class PairKind(ABC):
    """What is asked of a pair.

    Attributes:
        maps: scores a pair.
        target: what the scores should tell.
        same_cell: whether two tokens of one cell, such as a token and itself, count as a pair.
    """

    maps: ClassVar[int] = 1
    target: PairFunction
    same_cell: ClassVar[bool] = True

    @abstractmethod
    def score_(self, scores: Tensor, target: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        """Turn the scores ``(b, maps, n, N)`` of a block into the gradient of its losses, in place.

        Args:
            scores: changed.
            target: ``(b, n, N)``.
            grad: whether the gradient is wanted; else what is left in ``scores`` does not matter.

        Returns:
            Loss and measure of each pair, ``(b, n, N)``.
        """

    @abstractmethod
    def plain(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and measure of each pair, differentiable, in the most obvious way: the oracle."""

    def summary(self, measure: Tensor) -> Tensor:
        """Turn the mean measure into what is told."""
        return measure


class Relation(PairKind):
    """Cross entropy (nats) of the nine relation classes; the measure is the accuracy.

    A pair whose target ties with another class counts as wrong (authors' code, models/relvit.py:94-106,250-255).

    Args:
        smoothing: share of the target spread evenly over the nine classes, 0..1.
    """

    maps = CLASSES
    target = staticmethod(pair_relation)

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def score_(self, scores: Tensor, target: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        """See :class:`PairKind`.

        The target's score is taken out first: what is left tells the strongest rival, and the target's gradient
        p - 1 need not be formed as a difference.
        """
        smoothing, index = self.smoothing, target.unsqueeze(1)
        own = scores.gather(1, index).squeeze(1)
        mean = scores.mean(1) if smoothing else own
        scores.scatter_(1, index, -math.inf)
        rival = scores.amax(1)
        top = torch.maximum(own, rival)
        scores.sub_(top[:, None]).exp_()
        rest = scores.sum(1)
        total = rest + torch.exp(own - top)
        if grad:
            scores.div_(total[:, None])
            scores.scatter_(1, index, rest.div_(-total).unsqueeze_(1))
            if smoothing:
                scores.sub_(smoothing / CLASSES)
                scores.scatter_add_(1, index, torch.full_like(index, smoothing, dtype=scores.dtype))
        return total.log_().add_(top).sub_(torch.lerp(own, mean, smoothing)), own > rival

    def plain(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`PairKind`."""
        loss = F.cross_entropy(scores, target, reduction="none", label_smoothing=self.smoothing)
        return loss, scores.argmax(1) == target


class _Squared(PairKind):
    """Squared error; the measure is its root mean square (authors' code, models/relvit.py:240-277)."""

    def score_(self, scores: Tensor, target: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        loss = scores.sub_(target[:, None]).square().squeeze(1)
        scores.mul_(2)
        return loss, loss

    def plain(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.mse_loss(scores.squeeze(1), target, reduction="none")
        return loss, loss

    def summary(self, measure: Tensor) -> Tensor:
        return measure.sqrt()


class Distance(_Squared):
    """Squared error of the distance."""

    target = staticmethod(pair_distance)


class Angle(_Squared):
    """Squared error of the authors' angle."""

    target = staticmethod(pair_angle)


class Bearing(PairKind):
    """One less the cosine of the error of the bearing; the measure is the mean error in half turns, 0..1.

    A full turn more or less of the score changes nothing. By symmetry every constant answer has the loss 1 and the
    measure 0.5 on a whole grid.
    """

    target = staticmethod(pair_bearing)
    same_cell = False

    def score_(self, scores: Tensor, target: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        """See :class:`PairKind`."""
        error = scores.sub_(target[:, None]).squeeze(1)
        loss, measure = 1 - torch.cos(error * math.pi), self._measure(error)
        scores.mul_(math.pi).sin_().mul_(math.pi)
        return loss, measure

    def plain(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`PairKind`."""
        error = scores.squeeze(1) - target
        return 1 - torch.cos(error * math.pi), self._measure(error)

    def _measure(self, error: Tensor) -> Tensor:
        return (error - 2 * torch.round(error / 2)).abs()


def pair_loss(
    q: Tensor, k: Tensor, layout: PatchLayout, kind: PairKind, dropout: float = 0.0, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean loss and measure over all ordered pairs of valid tokens.

    Score m of the pair (i, j) is ``q[b, m, i] . k[b, m, j] / sqrt(width)``; i is the token whose place is asked, j the
    one it is seen from, and i = j counts where the ``kind`` says so. No tensor of N*N scores is kept. Scores and sums
    are in float32 or, for float64 inputs, in float64, also under autocast.

    Args:
        q: ``(B, maps, N, width)`` queries, any floating type.
        k: keys, as ``q``.
        layout: the places of the same ``(B, N)`` tokens.
        kind: what is asked.
        dropout: share of the pairs, 0..1, that the loss leaves out, chosen by torch's global generator; the measure
            sees all. (The authors' dropout has no effect without label smoothing, utils.py:236-258.)
        block: query rows at a time; None chooses by the size of a block.

    Returns:
        The loss (differentiable once) and the measure (no gradient). Both are 0 where there is no pair.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    seed = _dropout_seed(q, dropout)
    with torch.autocast(q.device.type, enabled=False):
        loss, measure = _PairLoss.apply(
            q.to(wide),
            k.to(wide),
            layout.row,
            layout.col,
            layout.valid,
            layout.extent(),
            seed,
            kind,
            dropout,
            block,
            grad,
        )
    return loss, measure


def _dropout_seed(q: Tensor, dropout: float) -> Tensor:
    return torch.randint(2**31, (), device=q.device) if dropout else torch.zeros((), device=q.device, dtype=torch.int64)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        row: Tensor,
        col: Tensor,
        valid: Tensor,
        extent: Tensor,
        seed: Tensor,
        kind: PairKind,
        dropout: float,
        block: int | None,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, maps, tokens, width = q.shape
        scale = 1 / math.sqrt(width)
        gone = ~valid[:, None, :, None]
        dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) if grad else None for x in (q, k))
        loss, measure = q.new_zeros(2, dtype=torch.float64)
        count, kept_count = torch.zeros(2, dtype=torch.int64, device=q.device)
        place = torch.arange(tokens, device=q.device)

        images, rows = _block_shape(q, block)
        for b in range(0, batch, images):
            here = slice(b, b + images)
            # With the tokens of invalid pairs zeroed, such a pair adds nothing to the other tokens'
            # gradients, so the planes of a block need no mask.
            keys = k[here].masked_fill(gone[here], 0).flatten(0, 1)
            other = row[here, None], col[here, None]
            image = torch.arange(b, min(b + images, batch), device=q.device)[:, None, None]
            for i in range(0, tokens, rows):
                some = slice(i, i + rows)
                queries = q[here, :, some].masked_fill(gone[here, :, some], 0).mul_(scale).flatten(0, 1)
                scores = torch.bmm(queries, keys.mT)
                planes = scores.unflatten(0, (-1, maps))
                own = row[here, some, None], col[here, some, None]
                target = kind.target(*own, *other, extent[here, None, None])
                pair_losses, measures = kind.score_(planes, target, grad)

                pairs = valid[here, some, None] & valid[here, None]
                if not kind.same_cell:
                    pairs &= (own[0] != other[0]) | (own[1] != other[1])
                kept = pairs
                if dropout:
                    kept = pairs & (hashed_uniform(seed, image, place[some, None], place) >= dropout)
                    kept_count += kept.sum()
                if kept is not pairs or not kind.same_cell:
                    planes.mul_(kept[:, None])
                count += pairs.sum()
                measure += (measures * pairs).sum()
                loss += (pair_losses * kept).sum()
                if dq is not None and dk is not None:
                    dq[here, :, some] = torch.bmm(scores, keys).unflatten(0, (-1, maps))
                    # beta=0 makes the first block of rows overwrite what the memory held.
                    dk[here].flatten(0, 1).baddbmm_(scores.mT, queries, beta=int(i > 0))

        count = count.clamp(min=1)
        used = kept_count.clamp(min=1) if dropout else count
        if dq is not None and dk is not None:
            ctx.save_for_backward(dq.masked_fill_(gone, 0), dk.masked_fill_(gone, 0), scale / used, 1 / used)
        measure = kind.summary(measure / count).to(q.dtype)
        ctx.mark_non_differentiable(measure)
        return (loss / used).to(q.dtype), measure

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, q_share, k_share = ctx.saved_tensors
        q_share, k_share = (grad_loss * share.to(grad_loss.dtype) for share in (q_share, k_share))
        return dq * q_share, dk * k_share, *(None,) * 9


def _block_shape(q: Tensor, block: int | None) -> tuple[int, int]:
    """Return how many images, and how many query rows of each, make one block of scores."""
    maps, tokens = q.shape[1:3]
    budget = BLOCK_BYTES.get(q.device.type, BLOCK_BYTES["cuda"]) // (maps * tokens * q.element_size())
    rows = min(tokens, block or max(1, budget))
    return max(1, budget // rows), rows


def pair_loss_plain(
    q: Tensor, k: Tensor, layout: PatchLayout, kind: PairKind, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Same as :func:`pair_loss` with all the ``(B, maps, N, N)`` scores in memory: the oracle."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    loss, measure = kind.plain(scores, all_pairs(kind.target, layout))
    pairs = layout.valid[:, :, None] & layout.valid[:, None, :]
    if not kind.same_cell:
        pairs &= all_pairs(pair_relation, layout) != CLASSES // 2
    image, place = torch.arange(len(q), device=q.device), torch.arange(q.shape[2], device=q.device)
    drawn = hashed_uniform(_dropout_seed(q, dropout), image[:, None, None], place[:, None], place)
    return loss[pairs & (drawn >= dropout)].mean(), kind.summary(measure[pairs].to(loss.dtype).mean())
