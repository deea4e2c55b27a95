"""Cross entropy over all ordered pairs of tokens in memory that grows with N, not with N^2.

The nine scores of a pair decide its loss alone, so the pairs are walked block by block of query rows.
Each block's gradient is formed at once, while its scores are at hand; only the gradients of the
queries and keys, shaped like them, wait for the backward pass.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.targets import relation_class, relation_classes

CLASSES = 9
# Scores of one block. On a CPU they should stay in its cache; on a GPU a block should be large
# enough to hide the cost of launching kernels.
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**27}


def relation_loss(
    q: Tensor, k: Tensor, layout: PatchLayout, block: int | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and accuracy of the relation classes over all ordered pairs of valid tokens.

    The score of class c for the pair (i, j) is ``q[b, c, i] . k[b, c, j] / sqrt(width)``; i is the token
    whose place is asked, j the one it is seen from, and i = j counts (authors' code,
    models/relvit.py:94-106,250-255). No tensor of N*N*9 scores is kept. Scores and sums are in float32
    or, for float64 inputs, in float64, also under autocast.

    Args:
        q, k: ``(B, 9, N, width)`` queries and keys, any floating type.
        layout: the places of the same ``(B, N)`` tokens.
        block: query rows at a time; None chooses by the size of a block.
        label_smoothing: share of the target spread evenly over the nine classes, 0..1.

    Returns:
        The loss (nats, differentiable once) and the accuracy (0..1, no gradient; a pair whose target ties
        with another class counts as wrong). Both are 0 where no token is valid.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    with torch.autocast(q.device.type, enabled=False):
        loss, accuracy = _RelationLoss.apply(
            q.to(wide), k.to(wide), layout.row, layout.col, layout.valid, block, label_smoothing, grad
        )
    return loss, accuracy


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        row: Tensor,
        col: Tensor,
        valid: Tensor,
        block: int | None,
        smoothing: float,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, _, tokens, width = q.shape
        scale = 1 / math.sqrt(width)
        gone = ~valid[:, None, :, None]
        dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) if grad else None for x in (q, k))
        loss = q.new_zeros(())
        correct = torch.zeros((), dtype=torch.int64, device=q.device)

        images, rows = _block_shape(q, block)
        for b in range(0, batch, images):
            here = slice(b, b + images)
            # With the tokens of invalid pairs zeroed, such a pair adds nothing to the other tokens'
            # gradients, so the nine planes of a block need no mask.
            keys = k[here].masked_fill(gone[here], 0).flatten(0, 1)
            for i in range(0, tokens, rows):
                some = slice(i, i + rows)
                queries = q[here, :, some].masked_fill(gone[here, :, some], 0).mul_(scale).flatten(0, 1)
                scores = torch.bmm(queries, keys.mT)
                target = relation_class(row[here, some, None], col[here, some, None], row[here, None], col[here, None])
                pair_loss, hit = _scores_to_gradient(scores.unflatten(0, (-1, CLASSES)), target, smoothing, grad)
                pairs = valid[here, some, None] & valid[here, None]
                loss += pair_loss.mul_(pairs).sum()
                correct += hit.logical_and_(pairs).sum()
                if dq is not None and dk is not None:
                    dq[here, :, some] = torch.bmm(scores, keys).unflatten(0, (-1, CLASSES))
                    # beta=0 makes the first block of rows overwrite what the memory held.
                    dk[here].flatten(0, 1).baddbmm_(scores.mT, queries, beta=int(i > 0))

        count = valid.sum(1).square().sum().clamp(min=1)
        if dq is not None and dk is not None:
            ctx.save_for_backward(dq.masked_fill_(gone, 0), dk.masked_fill_(gone, 0), scale / count, 1 / count)
        accuracy = (correct / count).to(q.dtype)
        ctx.mark_non_differentiable(accuracy)
        return loss / count, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, q_share, k_share = ctx.saved_tensors
        return dq * (q_share * grad_loss), dk * (k_share * grad_loss), *(None,) * 6


def _scores_to_gradient(scores: Tensor, target: Tensor, smoothing: float, grad: bool) -> tuple[Tensor, Tensor]:
    """Turn a block's scores ``(b, 9, n, N)`` into the gradient of its pair losses, in place.

    Returns the ``(b, n, N)`` losses and hits. The target's score is taken out first: what is left
    tells the strongest rival, and the target's gradient p - 1 need not be formed as a difference.
    """
    index = target.unsqueeze(1)
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


def _block_shape(q: Tensor, block: int | None) -> tuple[int, int]:
    """Return how many images, and how many query rows of each, make one block of scores."""
    tokens = q.shape[2]
    budget = BLOCK_BYTES.get(q.device.type, BLOCK_BYTES["cuda"]) // (CLASSES * tokens * q.element_size())
    rows = min(tokens, block or max(1, budget))
    return max(1, budget // rows), rows


def relation_loss_plain(
    q: Tensor, k: Tensor, layout: PatchLayout, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Same as :func:`relation_loss` with all the ``(B, 9, N, N)`` scores in memory: the oracle."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    target = relation_classes(layout)
    pairs = layout.valid[:, :, None] & layout.valid[:, None, :]
    loss = F.cross_entropy(scores, target, reduction="none", label_smoothing=label_smoothing)[pairs].mean()
    return loss, (scores.argmax(1) == target)[pairs].to(loss.dtype).mean()
