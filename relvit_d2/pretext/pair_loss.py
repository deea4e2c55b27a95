"""Losses over all ordered pairs of N tokens, with memory linear in N.

The loss of a pair depends on its scores alone, so pairs are processed in blocks of query rows. The gradient of a block
is computed in the forward pass together with its scores; only the gradients of queries and keys are kept for the
backward pass.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.targets import PairFunction, pair_bearing, pair_relation
from relvit_d2.utils.hashing import hashed_uniform

CLASSES = 9
# Bytes of the scores of a block: on a CPU they should fit into the cache, on a GPU hide the cost of kernel launches.
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**27}


class PairKind(ABC):
    """Loss and measure of a pair.

    Attributes:
        maps: scores per pair.
        target: the target of the scores.
        same_cell: whether two tokens of one cell, such as a token and itself, are a pair.
    """

    maps: ClassVar[int] = 1
    target: PairFunction
    same_cell: ClassVar[bool] = True

    @abstractmethod
    def score_(self, scores: Tensor, target: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        """Overwrite the scores ``(b, maps, n, N)`` of a block with the gradient of its losses.

        Args:
            scores: input and output.
            target: ``(b, n, N)``.
            grad: whether the gradient is needed; if not, ``scores`` are undefined afterwards.

        Returns:
            Loss and measure of each pair, ``(b, n, N)``.
        """

    def summary(self, measure: Tensor) -> Tensor:
        """Convert the mean measure of the pairs to the reported metric."""
        return measure


class Relation(PairKind):
    """Cross entropy (nats) of the nine relation classes; the measure is the accuracy.

    A pair whose target's score ties with another class is an error (authors' code, models/relvit.py:94-106,250-255).

    Args:
        smoothing: label smoothing, 0..1.
    """

    maps = CLASSES
    target = staticmethod(pair_relation)

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def score_(self, scores: Tensor, target: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        # Removing the target's score first gives the strongest other class, and the target's gradient p - 1 without
        # cancellation.
        smoothing, index = self.smoothing, target.unsqueeze(1)
        correct = scores.gather(1, index).squeeze(1)
        mean = scores.mean(1) if smoothing else correct
        scores.scatter_(1, index, -math.inf)
        rival = scores.amax(1)
        top = torch.maximum(correct, rival)
        scores.sub_(top[:, None]).exp_()
        rest = scores.sum(1)
        total = rest + torch.exp(correct - top)
        if grad:
            scores.div_(total[:, None])
            scores.scatter_(1, index, rest.div_(-total).unsqueeze_(1))
            if smoothing:
                scores.sub_(smoothing / CLASSES)
                scores.scatter_add_(1, index, torch.full_like(index, smoothing, dtype=scores.dtype))
        return total.log_().add_(top).sub_(torch.lerp(correct, mean, smoothing)), correct > rival


class SquaredError(PairKind):
    """Squared error of a target; the measure is its root mean square (authors' code, models/relvit.py:240-277)."""

    def __init__(self, target: PairFunction) -> None:
        self.target = target

    def score_(self, scores: Tensor, target: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        loss = scores.sub_(target[:, None]).square().squeeze(1)
        scores.mul_(2)
        return loss, loss

    def summary(self, measure: Tensor) -> Tensor:
        return measure.sqrt()


class Bearing(PairKind):
    """1 - cos of the bearing's error; the measure is the mean absolute error in half turns, 0..1.

    The loss is periodic in a full turn. By symmetry every constant prediction has the loss 1 and the measure 0.5 on a
    full grid.
    """

    target = staticmethod(pair_bearing)
    same_cell = False

    def score_(self, scores: Tensor, target: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        error = scores.sub_(target[:, None]).squeeze(1)
        loss, measure = 1 - torch.cos(error * math.pi), (error - 2 * torch.round(error / 2)).abs()
        scores.mul_(math.pi).sin_().mul_(math.pi)
        return loss, measure


def pair_loss(
    q: Tensor, k: Tensor, layout: PatchLayout, kind: PairKind, dropout: float = 0.0, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and measure over all ordered pairs of valid tokens.

    Score m of the pair (i, j), the position of token i relative to j, is ``q[b, m, i] . k[b, m, j] / sqrt(width)``.
    Scores and sums are float32, or float64 for float64 inputs, also under autocast.

    Args:
        q: ``(B, maps, N, width)`` queries, any floating type.
        k: keys, as ``q``.
        layout: the positions of the ``(B, N)`` tokens.
        kind: loss and target.
        dropout: fraction of the pairs, 0..1, that the loss omits, drawn from torch's global generator; the measure
            includes all. (The authors' dropout has no effect without label smoothing, utils.py:236-258.)
        block: query rows per block; None: as many as :data:`BLOCK_BYTES` allows.

    Returns:
        The loss (differentiable once) and the measure (no gradient), both 0 if there is no pair.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    seed = torch.randint(2**31, (), device=q.device) if dropout else None
    with torch.autocast(q.device.type, enabled=False):
        loss, measure = _PairLoss.apply(
            q.to(wide),
            k.to(wide),
            layout.row,
            layout.col,
            layout.valid,
            layout.extent,
            seed,
            kind,
            dropout,
            block,
            grad,
        )
    return loss, measure


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
        seed: Tensor | None,
        kind: PairKind,
        dropout: float,
        block: int | None,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, maps, tokens, width = q.shape
        scale = 1 / math.sqrt(width)
        padding = ~valid[:, None, :, None]
        dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) if grad else None for x in (q, k))
        loss, measure = q.new_zeros(2, dtype=torch.float64)
        count, kept_count = torch.zeros(2, dtype=torch.int64, device=q.device)
        index = torch.arange(tokens, device=q.device)

        images, rows = _block_shape(q, block)
        for b in range(0, batch, images):
            part = slice(b, b + images)
            # Padding is zero, so its pairs add nothing to the gradients of valid tokens, and scores need no mask.
            keys = k[part].masked_fill(padding[part], 0).flatten(0, 1)
            other = row[part, None], col[part, None]
            image = torch.arange(b, min(b + images, batch), device=q.device)[:, None, None]
            for i in range(0, tokens, rows):
                some = slice(i, i + rows)
                queries = q[part, :, some].masked_fill(padding[part, :, some], 0).mul_(scale).flatten(0, 1)
                scores = torch.bmm(queries, keys.mT)
                planes = scores.unflatten(0, (-1, maps))
                query = row[part, some, None], col[part, some, None]
                target = kind.target(*query, *other, extent[part, None, None])
                pair_losses, measures = kind.score_(planes, target, grad)

                pairs = valid[part, some, None] & valid[part, None]
                if not kind.same_cell:
                    pairs &= (query[0] != other[0]) | (query[1] != other[1])
                kept = pairs
                if seed is not None:
                    kept = pairs & (hashed_uniform(seed, image, index[some, None], index) >= dropout)
                    kept_count += kept.sum()
                if kept is not pairs or not kind.same_cell:
                    planes.mul_(kept[:, None])
                count += pairs.sum()
                measure += (measures * pairs).sum()
                loss += (pair_losses * kept).sum()
                if dq is not None and dk is not None:
                    dq[part, :, some] = torch.bmm(scores, keys).unflatten(0, (-1, maps))
                    # With beta=0 the first block of rows overwrites uninitialised memory.
                    dk[part].flatten(0, 1).baddbmm_(scores.mT, queries, beta=int(i > 0))

        count = count.clamp(min=1)
        used = kept_count.clamp(min=1) if dropout else count
        if dq is not None and dk is not None:
            ctx.save_for_backward(dq.masked_fill_(padding, 0), dk.masked_fill_(padding, 0), scale / used, 1 / used)
        measure = kind.summary(measure / count).to(q.dtype)
        ctx.mark_non_differentiable(measure)
        return (loss / used).to(q.dtype), measure

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, q_scale, k_scale = ctx.saved_tensors
        q_scale, k_scale = (grad_loss * scale.to(grad_loss.dtype) for scale in (q_scale, k_scale))
        return dq * q_scale, dk * k_scale, *(None,) * 9


def _block_shape(q: Tensor, block: int | None) -> tuple[int, int]:
    """Return the number of images, and of query rows of each, in a block."""
    maps, tokens = q.shape[1:3]
    budget = BLOCK_BYTES.get(q.device.type, BLOCK_BYTES["cuda"]) // (maps * tokens * q.element_size())
    rows = min(tokens, block or max(1, budget))
    return max(1, budget // rows), rows
